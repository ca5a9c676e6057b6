// softmax: rows over threads; each row is read from memory once, and written once.
//
// Forward moves 2 elements and does about 17 operations per element (exp is most of them): float32 is bound by memory,
// the half types by exp. The exponentials are kept as float32 in scratch, in L1: rounding them before the division
// would lose bits, and y may go past the caches. Backward moves 3 elements and does 4 operations: bound by memory.
#include "softmax.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const SoftmaxForward& a) {
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.rows * a.width, a.y == a.x);
  Failure no_memory;
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    const Scratch exponentials(a.width);
    if (!exponentials.ok()) return no_memory.set();
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + r * a.width;
      const float total = exponentials_of(row, exponentials.data(), a.width, max_over_row(a.width, row));
      const float scale = 1.0f / total;
      const T* next = r + 1 < end ? row + a.width : nullptr;
      map_row_before(next, y + r * a.width, a.width, [=](vec e) { return e * scale; }, exponentials.data());
    }
  });
  return !no_memory.happened();
}

template <class T>
bool backward(const SoftmaxBackward& a) {
  const T* dy = static_cast<const T*>(a.dy);
  const T* y = static_cast<const T*>(a.y);
  const Output<T> dx(a.dx, a.rows * a.width);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * a.width;
      softmax_backward_row(dy + at, y + at, dx + at, a.width, 1.0f, r + 1 < end);
    }
  });
  return true;
}

}  // namespace

bool softmax_forward(const SoftmaxForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool softmax_backward(const SoftmaxBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
