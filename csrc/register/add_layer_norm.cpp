#include "../register.h"

namespace llmcore {
namespace {

void add_layer_norm_forward_out(int64_t level, const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, const Tensor& y, const Tensor& total) {
  const Tensor input = as_contiguous(x), other = as_contiguous(residual);
  const auto [rows, width] = rows_of(input, "x");
  const Parameter w(weight, width, "weight"), b(bias, width, "bias");
  check_same(other, input, "residual", "x");
  check_same(y, input, "y", "x");
  check_same(total, input, "total", "x");
  check_scratch(kernels_of(level, input)
                    .add_layer_norm_forward({input.const_data_ptr(), other.const_data_ptr(), w.data, b.data,
                                             y.mutable_data_ptr(), total.mutable_data_ptr(), rows, width, float(eps),
                                             dtype_of(input, "x"), w.dtype, b.dtype}));
}

std::tuple<Tensor, Tensor> add_layer_norm_forward(int64_t level, const Tensor& x, const Tensor& residual,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  double eps) {
  const Tensor input = as_contiguous(x);
  const Tensor y = fresh_like(input), total = fresh_like(input);
  add_layer_norm_forward_out(level, input, residual, weight, bias, eps, y, total);
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(int64_t level, const Tensor& dy,
                                                           const OptionalTensor& dtotal, const Tensor& total,
                                                           const OptionalTensor& weight, double eps, bool need_dx,
                                                           bool need_dweight, bool need_dbias) {
  const Tensor gradient = as_contiguous(dy), input = as_contiguous(total);
  const auto [rows, width] = rows_of(input, "total");
  const Parameter w(weight, width, "weight");
  check_same(gradient, input, "dy", "total");
  OptionalTensor added;
  if (dtotal.has_value()) {
    added = as_contiguous(*dtotal);
    check_same(*added, input, "dtotal", "total");
  }
  const Tensor dx = fresh_like(input, need_dx);
  const Tensor dweight = float_vector(need_dweight, width, place_of(input)),
               dbias = float_vector(need_dbias, width, place_of(input));
  check_scratch(kernels_of(level, input)
                    .add_layer_norm_backward(
                        {{gradient.const_data_ptr(), input.const_data_ptr(), w.data,
                          need_dx ? dx.mutable_data_ptr() : nullptr, floats_of(dweight, need_dweight),
                          floats_of(dbias, need_dbias), rows, width, float(eps), dtype_of(input, "total"), w.dtype},
                         added.has_value() ? added->const_data_ptr() : nullptr}));
  return {dx, dweight, dbias};
}

template <typename Library>
void implement(Library& m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("add_layer_norm_forward_out", TORCH_BOX(&add_layer_norm_forward_out));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def(
      "add_layer_norm_forward(int level, Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_forward_out(int level, Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
      " Tensor(a!) y, Tensor(b!) total) -> ()");
  m.def(
      "add_layer_norm_backward(int level, Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, float eps,"
      " bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
