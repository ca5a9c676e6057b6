// add_rms_norm: rows over threads; each row of x and residual is read from memory once, and total and y written once:
// the norm finds the total in L1.
//
// Forward moves 4 elements and does 4 operations per element, backward moves 4 (3 without dtotal) and does about 9:
// both are bound by memory. The norm reads the rounded total, so that its bits are those of rms_norm after a plain sum.
#include "rms_norm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const AddRmsNormForward& a) {
  const RowParameter weight(a.weight, a.weight_dtype, a.width, 1.0f);
  if (!weight.ok()) return false;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const Output<T> total(a.total, a.rows * a.width, a.total == a.x || a.total == a.residual);
  const Output<T> y(a.y, a.rows * a.width);
  Failure no_memory;
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    const Scratch kept(total.past_caches ? GROUP * a.width : 0);
    if (!kept.ok()) return no_memory.set();
    for_rows<GROUP>(begin, end, [&](int64_t r, auto count) {
      const int64_t at = r * a.width, elements = count * a.width;
      const bool more = r + 2 * count <= end;
      T* sums = total.past_caches ? reinterpret_cast<T*>(kept.data()) : total.data + at;
      map_row(sums, elements, [](vec v, vec w) { return v + w; }, x + at, residual + at);
      rms_norm_rows<count>(sums, weight.data(), y + at, a.width, a.eps, more ? x + at + elements : nullptr);
      const T* next = more ? residual + at + elements : nullptr;
      if (total.past_caches) map_row_before(next, total + at, elements, [](vec v) { return v; }, sums);
    });
  });
  return !no_memory.happened();
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
