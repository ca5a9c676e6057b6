// rms_norm: rows over threads, each row read twice (the second time from L1) and written once.
//
// Forward moves 2 elements and does 3 operations per element, backward moves 3 and does about 8: both are bound by
// memory. Nothing is kept for the backward pass: 1/rms is recomputed from the row that has to be read anyway. dweight
// is summed in two stages, fixed blocks of rows and then the blocks in order, so that its bits do not depend on the
// number of threads.
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
INLINE float inverse_rms(const T* x, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_over_row(width, [](vec v) { return v * v; }, x) / float(width) + eps);
}

template <class T>
void forward_row(const T* x, const float* weight, T* y, int64_t width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  map_row(y, width, [=](vec v, vec w) { return v * scale * w; }, x, weight);
}

// With g = dy * weight and u = x / rms: dx = (g - u * mean(g * u)) / rms, dweight += dy * u.
template <class T>
void backward_row(const T* dy, const T* x, const float* weight, T* dx, float* dweight, int64_t width, float eps) {
  const float scale = inverse_rms(x, width, eps);
  if (dx != nullptr) {
    const auto product = [=](vec g, vec w, vec v) { return g * w * (v * scale); };
    const float mean_gu = sum_over_row(width, product, dy, weight, x) / float(width);
    map_row(dx, width, [=](vec g, vec w, vec v) { return (g * w - v * scale * mean_gu) * scale; }, dy, weight, x);
  }
  if (dweight != nullptr) {
    map_row(dweight, width, [=](vec d, vec g, vec v) { return fma(g, v * scale, d); }, dweight, dy, x);
  }
}

template <class T>
bool forward(const RmsNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  if (!weight.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      forward_row(x + r * a.width, weight.data(), y + r * a.width, a.width, a.eps);
    }
  });
  return true;
}

template <class T>
bool backward(const RmsNormBackward& a) {
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
      backward_row(dy + at, x + at, weight.data(), dx == nullptr ? nullptr : dx + at, dw, a.width, a.eps);
    }
  });
  dweight.reduce();
  return true;
}

}  // namespace

bool rms_norm_forward(const RmsNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool rms_norm_backward(const RmsNormBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
