#include "attention.h"

namespace llmcore {
namespace {

// Into a part of a cache: (B, G, T, D) and, with int8, (B, G, T), each by its strides.
void store_rows(int64_t level, const Tensor& rows, const Tensor& y, const OptionalTensor& scale) {
  const Tensor x = with_contiguous_heads(rows);
  check_heads(x, 4, "x");
  check_heads(y, 4, "y");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == y.size(i), "y: expected the shape of x");
  StoreRows a{};
  a.x = static_cast<const float*>(x.const_data_ptr()), a.y = y.mutable_data_ptr();
  a.B = x.size(0), a.G = x.size(1), a.T = x.size(2), a.D = x.size(3);
  set_strides(a.x_strides, x);
  set_strides(a.y_strides, y);
  if (y.scalar_type() == ScalarType::Char) {
    a.kv_dtype = KvDtype::int8;
    a.scale = const_cast<float*>(scales_of(scale, x, a.scale_strides, "scale"));
  } else {
    const bool is_bfloat16 = y.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(is_bfloat16 || y.scalar_type() == ScalarType::Float, "y: expected float32, bfloat16 or int8");
    a.kv_dtype = is_bfloat16 ? KvDtype::bfloat16 : KvDtype::same;
    STD_TORCH_CHECK(!scale.has_value(), "scale: expected none, y is not int8");
  }
  check_scratch(kernels_of(level).store_rows(a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("store_rows(int level, Tensor x, Tensor(a!) y, Tensor(b!)? scale=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { m.impl("store_rows", TORCH_BOX(&store_rows)); }

}  // namespace llmcore
