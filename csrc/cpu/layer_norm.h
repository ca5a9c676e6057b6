// Rows of layer_norm, for the op itself and for those that another step is fused with.
#pragma once

#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <int R, class T>
INLINE void means_of(float (&mean)[R], const T* x, int64_t width) {
  sum_over_rows(mean, width, [=](int r, auto at) { return at(x + r * width); });
  for (float& m : mean) m /= float(width);
}

template <int R, class T>
INLINE void moments_of(float (&mean)[R], float (&scale)[R], const T* x, int64_t width, float eps) {
  means_of(mean, x, width);
  sum_over_rows(scale, width, [&](int r, auto at) {
    const vec centred = at(x + r * width) - mean[r];
    return centred * centred;
  });
  for (float& s : scale) s = 1.0f / std::sqrt(s / float(width) + eps);
}

// R rows of x, one behind the other; `next` are those that will be read after them, or null.
template <int R, class T>
void layer_norm_rows(const T* x, const float* weight, const float* bias, const Output<T>& y, int64_t width, float eps,
                     const T* next) {
  float means[R], scales[R];  // scale: 1 / deviation
  moments_of(means, scales, x, width, eps);
  for (int r = 0; r < R; ++r) {
    const float mean = means[r], scale = scales[r];
    const auto normed = [=](vec v, vec w, vec b) { return fma((v - mean) * scale, w, b); };
    map_row_before(next == nullptr ? next : next + r * width, y + r * width, width, normed, x + r * width, weight,
                   bias);
  }
}

// What a row's gradient needs beside its own elements.
struct LayerNormBackwardRows {
  const float* weight;
  float* dweight;  // dweight += dy * u, or null
  float* dbias;    // dbias += dy, or null
  int64_t width;
  float eps;
};

// With g = dy * weight and u the normalised row: dx = (g - mean(g) - u * mean(g * u)) / deviation + added (if any),
// where dx is not null. R rows, each read from memory once; the next ones are `ahead` elements further.
template <int R, class T>
void layer_norm_backward_rows(const LayerNormBackwardRows& a, const T* dy, const T* x, const T* added,
                              const Output<T>& dx, int64_t ahead) {
  const int64_t width = a.width;
  const float* weight = a.weight;
  const float count = float(width);
  float mean[R], scale[R], mean_g[R], mean_gu[R];
  means_of(mean, x, width);
  Both<float, Both<float>> sums[R];
  sum_over_rows(sums, width, [&](int r, auto at) {
    const vec centred = at(x + r * width) - mean[r], g = at(dy + r * width) * at(weight);
    return Both<vec, Both<vec>>{centred * centred, {g, g * centred}};
  });
  for (int r = 0; r < R; ++r) {
    scale[r] = 1.0f / std::sqrt(sums[r].first / count + a.eps);
    mean_g[r] = sums[r].second.first / count;
    mean_gu[r] = sums[r].second.second * scale[r] / count;
  }

  for_vectors(width, [&](auto at) {
    const vec w = at(weight);
    vec dw = a.dweight == nullptr ? vec{} : at(a.dweight), db = a.dbias == nullptr ? vec{} : at(a.dbias);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch_vectors(dy + r * width + ahead + at.i, 1);
      prefetch_vectors(x + r * width + ahead + at.i, 1);
      const vec g = at(dy + r * width), u = (at(x + r * width) - mean[r]) * scale[r];
      dw = fma(g, u, dw);
      db += g;
      if (dx.data == nullptr) continue;
      vec d = (g * w - mean_g[r] - u * mean_gu[r]) * scale[r];
      if (added != nullptr) d += at(added + r * width);
      at.put(dx.data + r * width, d, dx.past_caches);
    }
    if (a.dweight != nullptr) at.put(a.dweight, dw);
    if (a.dbias != nullptr) at.put(a.dbias, db);
  });
}

// The whole backward pass; `added_to_dx` (rows, width) or null. dweight and dbias are summed in two stages, as in
// rms_norm.
template <class T>
bool layer_norm_backward_over_rows(const LayerNormBackward& a, const T* added_to_dx) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  RowPartials dweight(a.dweight, a.rows, a.width), dbias(a.dbias, a.rows, a.width);
  if (!weight.ok() || !dweight.ok() || !dbias.ok()) return false;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  Output<T> dx(a.dx, a.rows * a.width);
  dx.past_caches = dx.rows_past_caches(a.width);
  for_row_blocks(a.rows, [&](int64_t block, int64_t begin, int64_t end) {
    const LayerNormBackwardRows rows{weight.data(), dweight.zeroed(block), dbias.zeroed(block), a.width, a.eps};
    for_rows<GROUP>(begin, end, [&](int64_t r, auto count) {
      const int64_t at = r * a.width;
      const T* added = added_to_dx == nullptr ? nullptr : added_to_dx + at;
      layer_norm_backward_rows<count>(rows, dy + at, x + at, added, dx.data == nullptr ? dx : dx + at,
                                      r + 2 * count <= end ? count * a.width : 0);
    });
  });
  dweight.reduce();
  dbias.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
