#include "../register.h"

namespace llmcore {
namespace {

constexpr int64_t PANEL = 16;

// A contiguous tensor (panels, steps along K, 16).
void check_panels(const Tensor& t, int64_t panels, int64_t steps, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == panels && t.size(1) == steps && t.size(2) == PANEL && t.is_contiguous(),
                  name, ": expected a contiguous tensor (", panels, ", ", steps, ", 16)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, name, ": expected float16");
}

void forward_into(int64_t level, const Tensor& input, const Tensor& values, const Tensor& scales,
                  const OptionalTensor& minimums, const OptionalTensor& bias, int64_t outputs, const Tensor& out) {
  const Rows rows = rows_of(input, "x");
  LinearQuantizedForward a{};
  a.M = rows.width == 0 ? out.numel() / (outputs > 0 ? outputs : 1) : rows.rows, a.N = outputs, a.K = rows.width;
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == input.scalar_type() && out.numel() == a.M * a.N,
                  "out: expected a contiguous tensor of x's dtype, shape (..., ", outputs, ")");
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  STD_TORCH_CHECK(values.dim() == 4 && values.size(0) == panels && values.size(2) == PANEL && values.size(3) == 4 &&
                      values.scalar_type() == ScalarType::Byte && values.is_contiguous(),
                  "values: expected a contiguous uint8 tensor (", panels, ", K / 4 or K / 8, 16, 4)");
  a.format = values.size(1) * 4 == a.K ? QuantizedFormat::int8 : QuantizedFormat::int4;
  STD_TORCH_CHECK(a.format == QuantizedFormat::int8 || values.size(1) * 8 == a.K,
                  "x: expected the last axis of values' K, got ", a.K);
  STD_TORCH_CHECK(scales.dim() == 3, "scales: expected 3 axes");
  const int64_t groups = scales.size(1);
  a.group = groups > 0 ? a.K / groups : 16;
  STD_TORCH_CHECK(a.group >= 16 && (a.group & (a.group - 1)) == 0 && a.group * groups == a.K,
                  "scales: expected one for each group along K, a power of 2 of at least 16");
  check_panels(scales, panels, groups, "scales");
  if (minimums.has_value()) {
    STD_TORCH_CHECK(a.format == QuantizedFormat::int4, "minimums: int8 has none");
    check_panels(*minimums, panels, groups, "minimums");
    a.minimums = minimums->const_data_ptr();
  }
  const Parameter b(bias, a.N, "bias");
  a.x = input.const_data_ptr(), a.values = static_cast<const uint8_t*>(values.const_data_ptr());
  a.scales = scales.const_data_ptr(), a.bias = b.data, a.y = out.mutable_data_ptr();
  a.dtype = dtype_of(input, "x"), a.bias_dtype = b.dtype;
  check_scratch(kernels_of(level).linear_quantized_forward(a));
}

void linear_quantized_forward_out(int64_t level, const Tensor& x, const Tensor& values, const Tensor& scales,
                                  const OptionalTensor& minimums, const OptionalTensor& bias, int64_t outputs,
                                  const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == x.dim() && x.dim() >= 1 && out.size(out.dim() - 1) == outputs,
                  "out: expected shape (..., ", outputs, ")");
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    STD_TORCH_CHECK(out.size(i) == x.size(i), "out: expected the leading axes of x");
  }
  forward_into(level, as_contiguous(x), values, scales, minimums, bias, outputs, out);
}

Tensor linear_quantized_forward(int64_t level, const Tensor& x, const Tensor& values, const Tensor& scales,
                                const OptionalTensor& minimums, const OptionalTensor& bias, int64_t outputs) {
  STD_TORCH_CHECK(x.dim() >= 1 && outputs >= 0, "x: expected at least 1 axis");
  const Tensor input = as_contiguous(x);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = outputs;
  const Tensor out = fresh(sizes, input.scalar_type());
  forward_into(level, input, values, scales, minimums, bias, outputs, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def(
      "linear_quantized_forward(int level, Tensor x, Tensor values, Tensor scales, Tensor? minimums, Tensor? bias,"
      " int outputs) -> Tensor");
  m.def(
      "linear_quantized_forward_out(int level, Tensor x, Tensor values, Tensor scales, Tensor? minimums, Tensor? bias,"
      " int outputs, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_quantized_forward", TORCH_BOX(&linear_quantized_forward));
  m.impl("linear_quantized_forward_out", TORCH_BOX(&linear_quantized_forward_out));
}

}  // namespace llmcore
