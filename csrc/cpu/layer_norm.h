// Rows of layer_norm, for the op itself and for those that another step is fused with.
#pragma once

#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

struct Moments {
  float mean, inverse_deviation;
};

template <class T>
INLINE Moments moments_of(const T* x, int64_t width, float eps) {
  const float mean = sum_over_row(width, [](vec v) { return v; }, x) / float(width);
  const float variance = sum_over_row(width, [mean](vec v) { return (v - mean) * (v - mean); }, x) / float(width);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

template <class T>
void layer_norm_row(const T* x, const float* weight, const float* bias, T* y, int64_t width, float eps) {
  const auto [mean, scale] = moments_of(x, width, eps);
  map_row(y, width, [=](vec v, vec w, vec b) { return fma((v - mean) * scale, w, b); }, x, weight, bias);
}

// With g = dy * weight and u the normalised row: dx = (g - mean(g) - u * mean(g * u)) / deviation + added (if any).
template <class T>
void layer_norm_backward_row(const T* dy, const T* x, const float* weight, const T* added, T* dx, float* dweight,
                             float* dbias, int64_t width, float eps) {
  const auto [mean, scale] = moments_of(x, width, eps);
  if (dx != nullptr) {
    const float count = float(width);
    const float mean_g = sum_over_row(width, [](vec g, vec w) { return g * w; }, dy, weight) / count;
    const auto product = [=](vec g, vec w, vec v) { return g * w * ((v - mean) * scale); };
    const float mean_gu = sum_over_row(width, product, dy, weight, x) / count;
    const auto gradient = [=](vec g, vec w, vec v) { return (g * w - mean_g - (v - mean) * scale * mean_gu) * scale; };
    if (added == nullptr) {
      map_row(dx, width, gradient, dy, weight, x);
    } else {
      map_row(dx, width, [=](vec g, vec w, vec v, vec a) { return gradient(g, w, v) + a; }, dy, weight, x, added);
    }
  }
  if (dweight != nullptr) {
    map_row(dweight, width, [=](vec d, vec g, vec v) { return fma(g, (v - mean) * scale, d); }, dweight, dy, x);
  }
  if (dbias != nullptr) {
    map_row(dbias, width, [](vec d, vec g) { return d + g; }, dbias, dy);
  }
}

// The whole backward pass; `added_to_dx` (rows, width) or null. dweight and dbias are summed in two stages, as in
// rms_norm.
template <class T>
bool layer_norm_backward_rows(const LayerNormBackward& a, const T* added_to_dx) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  RowPartials dweight(a.dweight, a.rows, a.width), dbias(a.dbias, a.rows, a.width);
  if (!weight.ok() || !dweight.ok() || !dbias.ok()) return false;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  for_row_blocks(a.rows, [&](int64_t block, int64_t begin, int64_t end) {
    float* dw = dweight.partial(block);
    float* db = dbias.partial(block);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * a.width;
      const T* added = added_to_dx == nullptr ? nullptr : added_to_dx + at;
      T* dx_row = dx == nullptr ? nullptr : dx + at;
      layer_norm_backward_row(dy + at, x + at, weight.data(), added, dx_row, dw, db, a.width, a.eps);
    }
  });
  dweight.reduce();
  dbias.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
