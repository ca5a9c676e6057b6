// add_rms_norm: rows over threads; each row of x and residual is read from memory once, and total and y written once:
// the norm finds the total in L1.
//
// Forward moves 4 elements and does 4 operations per element, backward moves 4 (3 without dtotal) and does about 9:
// both are bound by memory. The norm reads the rounded total, so that its bits are those of rms_norm after a plain sum.
#include "add_norm.h"
#include "rms_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const AddRmsNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  if (!weight.ok()) return false;
  return add_and_norm<T>(a, [&](auto count, const T* sums, const Output<T>& y, const T* next) {
    rms_norm_rows<count>(sums, weight.data(), y, a.width, a.eps, next);
  });
}

}  // namespace

bool add_rms_norm_forward(const AddRmsNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool add_rms_norm_backward(const AddRmsNormBackward& a) {
  return with_dtype(a.norm.dtype, [&](auto t) {
    return rms_norm_backward_over_rows(a.norm, static_cast<const decltype(t)*>(a.dtotal));
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
