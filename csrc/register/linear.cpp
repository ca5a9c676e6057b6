#include "../register.h"

namespace llmcore {
namespace {

WeightFormat format_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return WeightFormat::float32;
    case ScalarType::BFloat16:
      return WeightFormat::bfloat16;
    case ScalarType::Half:
      return WeightFormat::float16;
    default:
      STD_TORCH_CHECK(false, "weight: expected float32, bfloat16 or float16");
  }
}

void linear_forward_into(int64_t level, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& out) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 axes");
  const Tensor values = as_contiguous(weight);
  LinearForward a{};
  a.N = values.size(0), a.K = values.size(1);
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == a.K, "x: expected a last axis of ", a.K);
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == input.scalar_type(),
                  "out: expected a contiguous tensor of x's dtype");
  a.M = 1;
  STD_TORCH_CHECK(out.dim() == input.dim() && out.size(out.dim() - 1) == a.N, "out: expected shape (..., ", a.N, ")");
  for (int64_t i = 0; i + 1 < input.dim(); ++i) {
    STD_TORCH_CHECK(out.size(i) == input.size(i), "out: expected the leading axes of x");
    a.M *= input.size(i);
  }
  const Parameter b(bias, a.N, "bias");
  a.x = input.const_data_ptr(), a.weight = values.const_data_ptr(), a.bias = b.data, a.y = out.mutable_data_ptr();
  a.dtype = dtype_of(input, "x"), a.bias_dtype = b.dtype, a.format = format_of(values);
  check_scratch(kernels_of(level).linear_forward(a));
}

void linear_forward_out(int64_t level, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& out) {
  linear_forward_into(level, as_contiguous(x), weight, bias, out);
}

Tensor linear_forward(int64_t level, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor input = as_contiguous(x);
  STD_TORCH_CHECK(weight.dim() == 2 && input.dim() >= 1, "weight: expected 2 axes, x at least 1");
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(0);
  const Tensor out = fresh(sizes, input.scalar_type());
  linear_forward_into(level, input, weight, bias, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("linear_forward(int level, Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_forward_out(int level, Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_forward_out", TORCH_BOX(&linear_forward_out));
}

}  // namespace llmcore
