#include "../register.h"

namespace llmcore {
namespace {

void gelu_forward_out(int64_t level, const Tensor& x, bool tanh, const Tensor& out) {
  const Tensor input = as_contiguous(x);
  check_same(out, input, "out", "x");
  check_scratch(kernels_of(level).gelu_forward(
      {input.const_data_ptr(), out.mutable_data_ptr(), input.numel(), dtype_of(input, "x"), tanh}));
}

Tensor gelu_forward(int64_t level, const Tensor& x, bool tanh) {
  const Tensor out = fresh_contiguous(x);
  gelu_forward_out(level, x, tanh, out);
  return out;
}

Tensor gelu_backward(int64_t level, const Tensor& dy, const Tensor& x, bool tanh) {
  const Tensor gradient = as_contiguous(dy), input = as_contiguous(x), dx = fresh_contiguous(x);
  check_same(gradient, input, "dy", "x");
  check_scratch(kernels_of(level).gelu_backward({gradient.const_data_ptr(), input.const_data_ptr(),
                                                 dx.mutable_data_ptr(), input.numel(), dtype_of(input, "x"), tanh}));
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("gelu_forward(int level, Tensor x, bool tanh) -> Tensor");
  m.def("gelu_forward_out(int level, Tensor x, bool tanh, Tensor(a!) out) -> ()");
  m.def("gelu_backward(int level, Tensor dy, Tensor x, bool tanh) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_forward_out", TORCH_BOX(&gelu_forward_out));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace llmcore
