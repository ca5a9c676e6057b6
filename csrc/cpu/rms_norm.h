// Rows of rms_norm, for the op itself and for those that another step is fused with.
#pragma once

#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// 1 / rms of R rows of x, one behind the other.
template <int R, class T>
INLINE void inverse_rms(float (&scales)[R], const T* x, int64_t width, float eps) {
  sum_over_rows(scales, width, [=](int r, auto at) {
    const vec v = at(x + r * width);
    return v * v;
  });
  for (float& scale : scales) scale = 1.0f / std::sqrt(scale / float(width) + eps);
}

// R rows of x; `next` are those that will be read after them, or null.
template <int R, class T>
void rms_norm_rows(const T* x, const float* weight, const Output<T>& y, int64_t width, float eps, const T* next) {
  float scales[R];
  inverse_rms(scales, x, width, eps);
  for (int r = 0; r < R; ++r) {
    const float scale = scales[r];
    const auto normed = [=](vec v, vec w) { return v * scale * w; };
    map_row_before(next == nullptr ? next : next + r * width, y + r * width, width, normed, x + r * width, weight);
  }
}

// What a row's gradient needs beside its own elements.
struct RmsNormBackwardRows {
  const float* weight;
  float* dweight;  // dweight += dy * u, or null
  int64_t width;
  float eps;
};

// With g = dy * weight and u = x / rms: dx = (g - u * mean(g * u)) / rms + added (if any), where dx is not null.
template <int R, class T>
void rms_norm_backward_rows(const RmsNormBackwardRows& a, const T* dy, const T* x, const T* added, const Output<T>& dx,
                            int64_t ahead) {
  const int64_t width = a.width;
  const float* weight = a.weight;
  float scale[R], mean_gu[R];
  Both<float> sums[R];
  sum_over_rows(sums, width, [=](int r, auto at) {
    const vec v = at(x + r * width);
    return Both<vec>{v * v, at(dy + r * width) * at(weight) * v};
  });
  for (int r = 0; r < R; ++r) {
    scale[r] = 1.0f / std::sqrt(sums[r].first / float(width) + a.eps);
    mean_gu[r] = sums[r].second * scale[r] / float(width);
  }

  for_vectors(width, [&](auto at) {
    const vec w = at(weight);
    vec dw = a.dweight == nullptr ? vec{} : at(a.dweight);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch_vectors(dy + r * width + ahead + at.i, 1);
      prefetch_vectors(x + r * width + ahead + at.i, 1);
      const vec g = at(dy + r * width), u = at(x + r * width) * scale[r];
      dw = fma(g, u, dw);
      if (dx.data == nullptr) continue;
      vec d = (g * w - u * mean_gu[r]) * scale[r];
      if (added != nullptr) d += at(added + r * width);
      at.put(dx.data + r * width, d, dx.past_caches);
    }
    if (a.dweight != nullptr) at.put(a.dweight, dw);
  });
}

// The whole backward pass; `added_to_dx` (rows, width) or null. dweight is summed in two stages, fixed blocks of rows
// and then the blocks in order, so that its bits do not depend on the number of threads.
template <class T>
bool rms_norm_backward_over_rows(const RmsNormBackward& a, const T* added_to_dx) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  RowPartials dweight(a.dweight, a.rows, a.width);
  if (!weight.ok() || !dweight.ok()) return false;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  Output<T> dx(a.dx, a.rows * a.width);
  dx.past_caches = dx.rows_past_caches(a.width);
  for_row_blocks(a.rows, [&](int64_t block, int64_t begin, int64_t end) {
    const RmsNormBackwardRows rows{weight.data(), dweight.zeroed(block), a.width, a.eps};
    for_rows<GROUP>(begin, end, [&](int64_t r, auto count) {
      const int64_t at = r * a.width;
      const T* added = added_to_dx == nullptr ? nullptr : added_to_dx + at;
      rms_norm_backward_rows<count>(rows, dy + at, x + at, added, dx.data == nullptr ? dx : dx + at,
                                    r + 2 * count <= end ? count * a.width : 0);
    });
  });
  dweight.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
