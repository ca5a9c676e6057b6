#include "../register.h"

namespace llmcore {
namespace {

void linear_forward_into(int64_t level, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& out) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 axes");
  const Tensor input = as_contiguous(x), values = as_contiguous(weight);
  const int64_t N = values.size(0), K = values.size(1), axes = input.dim();
  STD_TORCH_CHECK(axes >= 1 && input.size(axes - 1) == K, "x: expected a last axis of ", K);
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == input.scalar_type(),
                  "out: expected a contiguous tensor of x's dtype");
  STD_TORCH_CHECK(out.dim() == axes && out.size(axes - 1) == N, "out: expected shape (..., ", N, ")");
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < axes; ++i) {
    STD_TORCH_CHECK(out.size(i) == input.size(i), "out: expected the leading axes of x");
    M *= input.size(i);
  }
  const Parameter b(bias, N, "bias");
  check_scratch(
      kernels_of(level).linear_forward({input.const_data_ptr(), values.const_data_ptr(), b.data, out.mutable_data_ptr(),
                                        M, N, K, dtype_of(input, "x"), dtype_of(values, "weight"), b.dtype}));
}

Tensor linear_forward(int64_t level, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1, "weight: expected 2 axes, x at least 1");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  const Tensor out = fresh(sizes, x.scalar_type());
  linear_forward_into(level, x, weight, bias, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(int64_t level, const Tensor& dy, const Tensor& x,
                                                   const Tensor& weight, bool need_dx, bool need_dweight,
                                                   bool need_dbias) {
  STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && dy.dim() >= 1, "weight: expected 2 axes, x and dy at least 1");
  const Tensor gradient = as_contiguous(dy), input = as_contiguous(x), values = as_contiguous(weight);
  const int64_t N = values.size(0), K = values.size(1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) M *= input.size(i);
  STD_TORCH_CHECK(input.size(input.dim() - 1) == K, "x: expected a last axis of ", K);
  STD_TORCH_CHECK(gradient.size(gradient.dim() - 1) == N && gradient.numel() == M * N, "dy: expected shape (..., ", N,
                  ")");
  const Dtype dtype = dtype_of(input, "x");
  STD_TORCH_CHECK(dtype_of(gradient, "dy") == dtype && dtype_of(values, "weight") == dtype,
                  "dy, weight: expected x's dtype");
  const Tensor dx = fresh_like(input, need_dx), dweight = fresh_like(values, need_dweight);
  const Tensor dbias = float_vector(need_dbias, N);
  check_scratch(kernels_of(level).linear_backward({gradient.const_data_ptr(), input.const_data_ptr(),
                                                   values.const_data_ptr(), need_dx ? dx.mutable_data_ptr() : nullptr,
                                                   need_dweight ? dweight.mutable_data_ptr() : nullptr,
                                                   floats_of(dbias, need_dbias), M, N, K, dtype}));
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("linear_forward(int level, Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_forward_out(int level, Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "linear_backward(int level, Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_forward_out", TORCH_BOX(&linear_forward_into));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace llmcore
