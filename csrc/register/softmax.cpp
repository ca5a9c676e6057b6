#include "../register.h"

namespace llmcore {
namespace {

void softmax_forward_out(int64_t level, const Tensor& x, const Tensor& out) {
  const Tensor input = as_contiguous(x);
  const auto [rows, width] = rows_of(input, "x");
  check_same(out, input, "out", "x");
  check_scratch(
      kernels_of(level, input)
          .softmax_forward({input.const_data_ptr(), out.mutable_data_ptr(), rows, width, dtype_of(input, "x")}));
}

Tensor softmax_forward(int64_t level, const Tensor& x) {
  const Tensor input = as_contiguous(x);
  const Tensor out = fresh_like(input);
  softmax_forward_out(level, input, out);
  return out;
}

Tensor softmax_backward(int64_t level, const Tensor& dy, const Tensor& y) {
  const Tensor gradient = as_contiguous(dy), result = as_contiguous(y);
  const auto [rows, width] = rows_of(result, "y");
  check_same(gradient, result, "dy", "y");
  const Tensor dx = fresh_like(result);
  check_scratch(kernels_of(level, result)
                    .softmax_backward({gradient.const_data_ptr(), result.const_data_ptr(), dx.mutable_data_ptr(), rows,
                                       width, dtype_of(result, "y")}));
  return dx;
}

template <typename Library>
void implement(Library& m) {
  m.impl("softmax_forward", TORCH_BOX(&softmax_forward));
  m.impl("softmax_forward_out", TORCH_BOX(&softmax_forward_out));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("softmax_forward(int level, Tensor x) -> Tensor");
  m.def("softmax_forward_out(int level, Tensor x, Tensor(a!) out) -> ()");
  m.def("softmax_backward(int level, Tensor dy, Tensor y) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
