// Rows of rms_norm, for the op itself and for those that another step is fused with.
#pragma once

#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
INLINE float inverse_rms(const T* x, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_over_row(width, [](vec v) { return v * v; }, x) / float(width) + eps);
}

template <class T>
void rms_norm_row(const T* x, const float* weight, T* y, int64_t width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  map_row(y, width, [=](vec v, vec w) { return v * scale * w; }, x, weight);
}

// With g = dy * weight and u = x / rms: dx = (g - u * mean(g * u)) / rms + added (if any), dweight += dy * u.
template <class T>
void rms_norm_backward_row(const T* dy, const T* x, const float* weight, const T* added, T* dx, float* dweight,
                           int64_t width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  if (dx != nullptr) {
    const auto product = [=](vec g, vec w, vec v) { return g * w * (v * scale); };
    const float mean_gu = sum_over_row(width, product, dy, weight, x) / float(width);
    const auto gradient = [=](vec g, vec w, vec v) { return (g * w - v * scale * mean_gu) * scale; };
    if (added == nullptr) {
      map_row(dx, width, gradient, dy, weight, x);
    } else {
      map_row(dx, width, [=](vec g, vec w, vec v, vec a) { return gradient(g, w, v) + a; }, dy, weight, x, added);
    }
  }
  if (dweight != nullptr) {
    map_row(dweight, width, [=](vec d, vec g, vec v) { return fma(g, v * scale, d); }, dweight, dy, x);
  }
}

// The whole backward pass; `added_to_dx` (rows, width) or null. dweight is summed in two stages, fixed blocks of rows
// and then the blocks in order, so that its bits do not depend on the number of threads.
template <class T>
bool rms_norm_backward_rows(const RmsNormBackward& a, const T* added_to_dx) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  RowPartials dweight(a.dweight, a.rows, a.width);
  if (!weight.ok() || !dweight.ok()) return false;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  for_row_blocks(a.rows, [&](int64_t block, int64_t begin, int64_t end) {
    float* dw = dweight.partial(block);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * a.width;
      const T* added = added_to_dx == nullptr ? nullptr : added_to_dx + at;
      T* dx_row = dx == nullptr ? nullptr : dx + at;
      rms_norm_backward_row(dy + at, x + at, weight.data(), added, dx_row, dw, a.width, a.eps);
    }
  });
  dweight.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
