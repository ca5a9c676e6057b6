// softmax: rows over threads; each row is read from memory once, and written once.
//
// Forward moves 2 elements and does about 20 operations per element (exp is most of them): float32 is bound by memory,
// the half types by exp. Their exponentials are kept as float32 in scratch, since rounding them before the division
// would lose bits. Backward moves 3 elements and does 4 operations: bound by memory.
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// `exponentials` may be y itself.
template <class T>
void forward_row(const T* x, float* exponentials, T* y, int64_t width) {
  const float highest = max_over_row(width, x);
  map_row(exponentials, width, [=](vec v) { return exp(v - highest); }, x);
  const float scale = 1.0f / sum_over_row(width, [](vec e) { return e; }, exponentials);
  map_row(y, width, [=](vec e) { return e * scale; }, exponentials);
}

template <class T>
void backward_row(const T* dy, const T* y, T* dx, int64_t width) {
  const float dot = sum_over_row(width, [](vec g, vec p) { return g * p; }, dy, y);
  map_row(dx, width, [=](vec g, vec p) { return p * (g - dot); }, dy, y);
}

template <class T>
bool forward(const SoftmaxForward& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  Failure no_memory;
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 4) {
      for (int64_t r = begin; r < end; ++r) forward_row(x + r * a.width, y + r * a.width, y + r * a.width, a.width);
    } else {
      const Scratch exponentials(a.width);
      if (!exponentials.ok()) return no_memory.set();
      for (int64_t r = begin; r < end; ++r) {
        forward_row(x + r * a.width, exponentials.data(), y + r * a.width, a.width);
      }
    }
  });
  return !no_memory.happened();
}

template <class T>
bool backward(const SoftmaxBackward& a) {
  const T* dy = static_cast<const T*>(a.dy);
  const T* y = static_cast<const T*>(a.y);
  T* dx = static_cast<T*>(a.dx);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) backward_row(dy + r * a.width, y + r * a.width, dx + r * a.width, a.width);
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
