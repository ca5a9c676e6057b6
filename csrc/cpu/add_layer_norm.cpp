// add_layer_norm: rows over threads; each row of x and residual is read from memory once, and total and y written once:
// the norm finds the total in L1.
//
// Forward moves 4 elements and does about 7 operations per element, backward moves 4 (3 without dtotal) and does about
// 13: both are bound by memory. The norm reads the rounded total, so that its bits are those of layer_norm after a
// plain sum.
#include "layer_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const AddLayerNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f), bias(a.bias, a.bias_dtype, a.width, 0.0f);
  if (!weight.ok() || !bias.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  T* total = static_cast<T*>(a.total);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * a.width;
      map_row(total + at, a.width, [](vec v, vec w) { return v + w; }, x + at, residual + at);
      layer_norm_row(total + at, weight.data(), bias.data(), y + at, a.width, a.eps);
    }
  });
  return true;
}

}  // namespace

bool add_layer_norm_forward(const AddLayerNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool add_layer_norm_backward(const AddLayerNormBackward& a) {
  return with_dtype(a.norm.dtype, [&](auto t) {
    return layer_norm_backward_rows(a.norm, static_cast<const decltype(t)*>(a.dtotal));
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
