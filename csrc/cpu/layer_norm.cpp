// layer_norm: rows over threads, each row read from memory once (again from L1 for the variance and the result) and
// written once.
//
// Forward moves 2 elements and does about 6 operations per element, backward moves 3 and does about 12: both are bound
// by memory. The variance is that of the centred row, in a pass of its own: E[x^2] - E[x]^2 cancels. Mean and deviation
// are recomputed by the backward pass.
#include "layer_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const LayerNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f), bias(a.bias, a.bias_dtype, a.width, 0.0f);
  if (!weight.ok() || !bias.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.rows * a.width, a.y == a.x);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for_rows<GROUP>(begin, end, [&](int64_t r, auto count) {
      const int64_t at = r * a.width;
      const T* next = r + 2 * count <= end ? x + at + count * a.width : nullptr;
      layer_norm_rows<count>(x + at, weight.data(), bias.data(), y + at, a.width, a.eps, next);
    });
  });
  return true;
}

}  // namespace

bool layer_norm_forward(const LayerNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool layer_norm_backward(const LayerNormBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return layer_norm_backward_over_rows<decltype(t)>(a, nullptr); });
}

}  // namespace llmcore::LLMCORE_LEVEL
