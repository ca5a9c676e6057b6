// rms_norm: rows over threads, each row read twice (the second time from L1) and written once.
//
// Forward moves 2 elements and does 3 operations per element, backward moves 3 and does about 8: both are bound by
// memory. Nothing is kept for the backward pass: 1/rms is recomputed from the row that has to be read anyway.
#include "rms_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const RmsNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  if (!weight.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.rows * a.width, a.y == a.x);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for_rows<GROUP>(begin, end, [&](int64_t r, auto count) {
      const int64_t at = r * a.width;
      const T* next = r + 2 * count <= end ? x + at + count * a.width : nullptr;
      rms_norm_rows<count>(x + at, weight.data(), y + at, a.width, a.eps, next);
    });
  });
  return true;
}

}  // namespace

bool rms_norm_forward(const RmsNormForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool rms_norm_backward(const RmsNormBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return rms_norm_backward_over_rows<decltype(t)>(a, nullptr); });
}

}  // namespace llmcore::LLMCORE_LEVEL
