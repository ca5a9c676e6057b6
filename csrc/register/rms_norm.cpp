#include "../register.h"

namespace llmcore {
namespace {

void rms_norm_forward_out(int64_t level, const Tensor& x, const OptionalTensor& weight, double eps, const Tensor& out) {
  const Tensor input = as_contiguous(x);
  const auto [rows, width] = rows_of(input, "x");
  const Parameter w(weight, width, "weight");
  check_same(out, input, "out", "x");
  check_scratch(kernels_of(level, input)
                    .rms_norm_forward({input.const_data_ptr(), w.data, out.mutable_data_ptr(), rows, width, float(eps),
                                       dtype_of(input, "x"), w.dtype}));
}

Tensor rms_norm_forward(int64_t level, const Tensor& x, const OptionalTensor& weight, double eps) {
  const Tensor input = as_contiguous(x);
  const Tensor out = fresh_like(input);
  rms_norm_forward_out(level, input, weight, eps, out);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(int64_t level, const Tensor& dy, const Tensor& x,
                                             const OptionalTensor& weight, double eps, bool need_dx,
                                             bool need_dweight) {
  const Tensor gradient = as_contiguous(dy), input = as_contiguous(x);
  const auto [rows, width] = rows_of(input, "x");
  const Parameter w(weight, width, "weight");
  check_same(gradient, input, "dy", "x");
  const Tensor dx = fresh_like(input, need_dx);
  const Tensor dweight = float_vector(need_dweight, width, place_of(input));
  check_scratch(kernels_of(level, input)
                    .rms_norm_backward({gradient.const_data_ptr(), input.const_data_ptr(), w.data,
                                        need_dx ? dx.mutable_data_ptr() : nullptr, floats_of(dweight, need_dweight),
                                        rows, width, float(eps), dtype_of(input, "x"), w.dtype}));
  return {dx, dweight};
}

template <typename Library>
void implement(Library& m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_forward_out", TORCH_BOX(&rms_norm_forward_out));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("rms_norm_forward(int level, Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("rms_norm_forward_out(int level, Tensor x, Tensor? weight, float eps, Tensor(a!) out) -> ()");
  m.def(
      "rms_norm_backward(int level, Tensor dy, Tensor x, Tensor? weight, float eps, bool need_dx, bool need_dweight)"
      " -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
