#include <vector>

#include "../register.h"

namespace llmcore {
namespace {

// The strides of a mask that is broadcast to x.
std::vector<int64_t> mask_strides(const Tensor& mask, const Tensor& x) {
  const int64_t lacking = x.dim() - mask.dim();
  STD_TORCH_CHECK(lacking >= 0, "mask: expected at most the axes of x");
  std::vector<int64_t> strides(size_t(x.dim()), 0);
  for (int64_t i = 0; i < mask.dim(); ++i) {
    STD_TORCH_CHECK(mask.size(i) == x.size(i + lacking) || mask.size(i) == 1, "mask: axis ", i, " does not broadcast");
    strides[size_t(i + lacking)] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  return strides;
}

void masked_softmax_forward_out(int64_t level, const Tensor& x, const OptionalTensor& mask, bool causal, double scale,
                                const Tensor& out) {
  const Tensor input = as_contiguous(x);
  const auto [rows, width] = rows_of(input, "x");
  check_same(out, input, "out", "x");
  STD_TORCH_CHECK(!causal || input.dim() >= 2, "x: expected (..., T, S) with causal");
  const auto sizes = input.sizes();
  MaskedSoftmaxForward a{};
  a.x = input.const_data_ptr(), a.y = out.mutable_data_ptr();
  a.rows = rows, a.axes = input.dim(), a.sizes = sizes.data();
  a.causal = causal, a.scale = float(scale), a.dtype = dtype_of(input, "x");
  std::vector<int64_t> strides;
  if (mask.has_value()) {
    strides = mask_strides(*mask, input);
    a.mask = mask->const_data_ptr(), a.mask_strides = strides.data();
    a.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
    if (!a.mask_is_bool) a.mask_dtype = dtype_of(*mask, "mask");
  }
  check_scratch(kernels_of(level).masked_softmax_forward(a));
}

Tensor masked_softmax_forward(int64_t level, const Tensor& x, const OptionalTensor& mask, bool causal, double scale) {
  const Tensor input = as_contiguous(x);
  const Tensor out = fresh_like(input);
  masked_softmax_forward_out(level, input, mask, causal, scale, out);
  return out;
}

Tensor masked_softmax_backward(int64_t level, const Tensor& dy, const Tensor& y, bool causal, double scale) {
  const Tensor gradient = as_contiguous(dy), result = as_contiguous(y);
  const auto [rows, width] = rows_of(result, "y");
  check_same(gradient, result, "dy", "y");
  STD_TORCH_CHECK(!causal || result.dim() >= 2, "y: expected (..., T, S) with causal");
  const Tensor dx = fresh_like(result);
  check_scratch(kernels_of(level).masked_softmax_backward(
      {gradient.const_data_ptr(), result.const_data_ptr(), dx.mutable_data_ptr(), rows,
       result.dim() < 2 ? 1 : result.size(result.dim() - 2), width, causal, float(scale), dtype_of(result, "y")}));
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("masked_softmax_forward(int level, Tensor x, Tensor? mask, bool causal, float scale) -> Tensor");
  m.def(
      "masked_softmax_forward_out(int level, Tensor x, Tensor? mask, bool causal, float scale, Tensor(a!) out)"
      " -> ()");
  m.def("masked_softmax_backward(int level, Tensor dy, Tensor y, bool causal, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("masked_softmax_forward", TORCH_BOX(&masked_softmax_forward));
  m.impl("masked_softmax_forward_out", TORCH_BOX(&masked_softmax_forward_out));
  m.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward));
}

}  // namespace llmcore
