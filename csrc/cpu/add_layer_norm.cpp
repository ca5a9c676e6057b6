// add_layer_norm: rows over threads; each row of x and residual is read from memory once, and total and y written once:
// the norm finds the total in L1.
//
// Forward moves 4 elements and does about 7 operations per element, backward moves 4 (3 without dtotal) and does about
// 13: both are bound by memory. The norm reads the rounded total, so that its bits are those of layer_norm after a
// plain sum.
#include "add_norm.h"
#include "layer_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const AddLayerNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f), bias(a.bias, a.bias_dtype, a.width, 0.0f);
  if (!weight.ok() || !bias.ok()) return false;
  return add_and_norm<T>(a, [&](auto count, const T* sums, const Output<T>& y, const T* next) {
    layer_norm_rows<count>(sums, weight.data(), bias.data(), y, a.width, a.eps, next);
  });
}

}  // namespace

bool add_layer_norm_forward(const AddLayerNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool add_layer_norm_backward(const AddLayerNormBackward& a) {
  return with_dtype(a.norm.dtype, [&](auto t) {
    return layer_norm_backward_over_rows(a.norm, static_cast<const decltype(t)*>(a.dtotal));
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
