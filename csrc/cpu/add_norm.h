// The sum that add_layer_norm and add_rms_norm take before their norms.
#pragma once

#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// total = x + residual and y = the norm of that, rows over threads. norm(count, sums, y, next) takes `count` rows (a
// constant) of rounded sums, which it finds in L1; `next` are the elements of x that will be read after them, or null.
template <class T, class Arguments, class Norm>
bool add_and_norm(const Arguments& a, const Norm& norm) {
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
      norm(count, sums, y + at, more ? x + at + elements : nullptr);
      const T* next = more ? residual + at + elements : nullptr;
      if (total.past_caches) map_row_before(next, total + at, elements, [](vec v) { return v; }, sums);
    });
  });
  return !no_memory.happened();
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
