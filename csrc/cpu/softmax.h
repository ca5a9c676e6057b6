// Steps of softmax over a row, for the op itself and with a mask.
#pragma once

#include "functions.h"
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// exponentials = exp(x - highest), which may be x itself; returns their sum.
template <class T>
INLINE float exponentials_of(const T* x, float* exponentials, int64_t width, float highest) {
  return sum_over_row_at(width, [=](auto at) {
    const vec e = exp_not_positive(at(x) - highest);
    at.put(exponentials, e);
    return e;
  });
}

// sum(a * b)
template <class T>
INLINE float dot_of_rows(int64_t width, const T* a, const T* b) {
  return sum_over_row(width, [](vec v, vec w) { return v * w; }, a, b);
}
// Pairs of bfloat16 are multiplied as they lie in memory, which spares widening them.
INLINE float dot_of_rows(int64_t width, const bfloat16* a, const bfloat16* b) {
  constexpr int CHAINS = 4, PAIRS = 2 * LANES;
  const auto pairs = [](const bfloat16* p) { return load(reinterpret_cast<const float*>(p)); };
  vec sum[CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * PAIRS <= width; i += CHAINS * PAIRS) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c)
      sum[c] = add_pair_products(sum[c], pairs(a + i + c * PAIRS), pairs(b + i + c * PAIRS));
  }
  for (; i + PAIRS <= width; i += PAIRS) sum[0] = add_pair_products(sum[0], pairs(a + i), pairs(b + i));
  const float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return i == width ? total : total + dot_of_rows<bfloat16>(width - i, a + i, b + i);
}

// dx = y * (dy - sum(dy * y)) * scale; with `more` the next row of dy is asked for.
template <class T>
INLINE void softmax_backward_row(const T* dy, const T* y, const Output<T>& dx, int64_t width, float scale, bool more) {
  const float dot = dot_of_rows(width, dy, y);
  const T* next = more ? dy + width : nullptr;
  map_row_before(next, dx, width, [=](vec g, vec p) { return p * (g - dot) * scale; }, dy, y);
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
