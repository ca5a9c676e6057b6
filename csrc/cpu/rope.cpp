// rope: heads of one position (rows) over threads, in the order of y; each row is read and written once.
//
// Moves 2 elements and does 3 operations per element, beside cos and sin, which every head reads again from the caches:
// bound by memory. The backward pass is the same rotation by the opposite angle.
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// (a, b) turned by the angle of (c, s).
INLINE void turn(vec& a, vec& b, vec c, vec s) {
  const vec turned = a * c - b * s;
  b = b * c + a * s;
  a = turned;
}

// Pairs (r, r + half). `sign` -1 turns back.
template <class T, class Angle>
void turn_halves(const T* x, const Angle* cos, const Angle* sin, T* y, int64_t half, float sign) {
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    vec a = load(x + i), b = load(x + half + i);
    turn(a, b, load(cos + i), load(sin + i) * sign);
    store(y + i, a);
    store(y + half + i, b);
  }
  if (const int64_t n = half - i; n > 0) {
    vec a = load_partial(x + i, n), b = load_partial(x + half + i, n);
    turn(a, b, load_partial(cos + i, n), load_partial(sin + i, n) * sign);
    store_partial(y + i, a, n);
    store_partial(y + half + i, b, n);
  }
}

// Pairs (2r, 2r + 1).
template <class T, class Angle>
void turn_neighbours(const T* x, const Angle* cos, const Angle* sin, T* y, int64_t half, float sign) {
  const auto turned = [&](vec& low, vec& high, vec c, vec s) __attribute__((always_inline)) {
    vec a, b;
    split_pairs(low, high, a, b);
    turn(a, b, c, s * sign);
    join_pairs(a, b, low, high);
  };
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    vec low = load(x + 2 * i), high = load(x + 2 * i + LANES);
    turned(low, high, load(cos + i), load(sin + i));
    store(y + 2 * i, low);
    store(y + 2 * i + LANES, high);
  }
  if (const int64_t n = half - i; n > 0) {
    T pairs[2 * LANES] = {};
    std::memcpy(pairs, x + 2 * i, size_t(2 * n) * sizeof(T));
    vec low = load(pairs), high = load(pairs + LANES);
    turned(low, high, load_partial(cos + i, n), load_partial(sin + i, n));
    store(pairs, low);
    store(pairs + LANES, high);
    std::memcpy(y + 2 * i, pairs, size_t(2 * n) * sizeof(T));
  }
}

template <class T, class Angle>
bool turn_rows(const Rope& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const Angle* cos = static_cast<const Angle*>(a.cos);
  const Angle* sin = static_cast<const Angle*>(a.sin);
  const float sign = a.back ? -1.0f : 1.0f;
  const int64_t rest = a.D - 2 * a.half;
  parallel_rows(a.B * a.H * a.T, a.D, [&](int64_t begin, int64_t end) {
    int64_t t = begin % a.T, h = begin / a.T % a.H, b = begin / a.T / a.H;
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + b * a.x_strides[0] + h * a.x_strides[1] + t * a.x_strides[2];
      T* to = y + r * a.D;
      const int64_t angle = b * a.angle_batch_stride + t * a.half;
      const auto turn_row = a.interleaved ? turn_neighbours<T, Angle> : turn_halves<T, Angle>;
      turn_row(from, cos + angle, sin + angle, to, a.half, sign);
      if (rest > 0 && to != from) std::memcpy(to + 2 * a.half, from + 2 * a.half, size_t(rest) * sizeof(T));

      if (++t < a.T) continue;
      t = 0;
      if (++h < a.H) continue;
      h = 0, ++b;
    }
  });
  return true;
}

}  // namespace

// 3 dtypes x (float32 angles or its own) = 5 builds.
bool rope(const Rope& a) {
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    return a.angle_dtype == Dtype::float32 ? turn_rows<T, float>(a) : turn_rows<T, T>(a);
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
