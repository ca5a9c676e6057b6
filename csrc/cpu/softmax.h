// Steps of softmax over a row, for the op itself and with a mask.
#pragma once

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

// dx = y * (dy - sum(dy * y)) * scale; with `more` the next rows of dy and y are asked for.
template <class T>
INLINE void softmax_backward_row(const T* dy, const T* y, const Output<T>& dx, int64_t width, float scale, bool more) {
  const float dot = sum_over_row(width, [](vec g, vec p) { return g * p; }, dy, y);
  const T* next = more ? dy + width : nullptr;
  map_row_before(next, dx, width, [=](vec g, vec p) { return p * (g - dot) * scale; }, dy, y);
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
