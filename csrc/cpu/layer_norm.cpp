// layer_norm: rows over threads, each row read from memory once (again from L1 for the variance and the result) and
// written once.
//
// Forward moves 2 elements and does about 6 operations per element, backward moves 3 and does about 12: both are bound
// by memory. The variance is that of the centred row, in a pass of its own: E[x^2] - E[x]^2 cancels. Mean and deviation
// are recomputed by the backward pass; dweight and dbias are summed in two stages, as in rms_norm.
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
void forward_row(const T* x, const float* weight, const float* bias, T* y, int64_t width, float eps) {
  const auto [mean, scale] = moments_of(x, width, eps);
  map_row(y, width, [=](vec v, vec w, vec b) { return fma((v - mean) * scale, w, b); }, x, weight, bias);
}

// With g = dy * weight and u the normalised row: dx = (g - mean(g) - u * mean(g * u)) / deviation.
template <class T>
void backward_row(const T* dy, const T* x, const float* weight, T* dx, float* dweight, float* dbias, int64_t width,
                  float eps) {
  const auto [mean, scale] = moments_of(x, width, eps);
  if (dx != nullptr) {
    const float count = float(width);
    const float mean_g = sum_over_row(width, [](vec g, vec w) { return g * w; }, dy, weight) / count;
    const auto product = [=](vec g, vec w, vec v) { return g * w * ((v - mean) * scale); };
    const float mean_gu = sum_over_row(width, product, dy, weight, x) / count;
    const auto gradient = [=](vec g, vec w, vec v) { return (g * w - mean_g - (v - mean) * scale * mean_gu) * scale; };
    map_row(dx, width, gradient, dy, weight, x);
  }
  if (dweight != nullptr) {
    map_row(dweight, width, [=](vec d, vec g, vec v) { return fma(g, (v - mean) * scale, d); }, dweight, dy, x);
  }
  if (dbias != nullptr) {
    map_row(dbias, width, [](vec d, vec g) { return d + g; }, dbias, dy);
  }
}

template <class T>
bool forward(const LayerNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f), bias(a.bias, a.bias_dtype, a.width, 0.0f);
  if (!weight.ok() || !bias.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      forward_row(x + r * a.width, weight.data(), bias.data(), y + r * a.width, a.width, a.eps);
    }
  });
  return true;
}

template <class T>
bool backward(const LayerNormBackward& a) {
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
      backward_row(dy + at, x + at, weight.data(), dx == nullptr ? nullptr : dx + at, dw, db, a.width, a.eps);
    }
  });
  dweight.reduce();
  dbias.reduce();
  return true;
}

}  // namespace

bool layer_norm_forward(const LayerNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool layer_norm_backward(const LayerNormBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
