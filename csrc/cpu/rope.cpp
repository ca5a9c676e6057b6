// rope: blocks of positions over threads, all heads of a block together; each row is read and written once.
//
// Moves 2 elements and does 3 operations per element, beside cos and sin, which every head reads again from L1: bound
// by memory. The backward pass is the same rotation by the opposite angle.
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int64_t POSITIONS = 64;  // whose angles stay in L1 for all heads

// (a, b) turned by the angle of (c, s).
INLINE void turn(vec& a, vec& b, vec c, vec s) {
  const vec turned = a * c - b * s;
  b = b * c + a * s;
  a = turned;
}

// Pairs (r, r + half). `sign` -1 turns back.
template <class T, class Angle>
INLINE void turn_halves(const T* x, const Angle* cos, const Angle* sin, T* y, int64_t half, float sign,
                        bool past_caches) {
  for_vectors(half, [&](auto at) {
    vec a = at(x), b = at(x + half);
    turn(a, b, at(cos), at(sin) * sign);
    at.put(y, a, past_caches);
    at.put(y + half, b, past_caches);
  });
}

// Pairs (2r, 2r + 1).
template <class T, class Angle>
INLINE void turn_neighbours(const T* x, const Angle* cos, const Angle* sin, T* y, int64_t half, float sign,
                            bool past_caches) {
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
    past_caches ? store_past_caches(y + 2 * i, low, high) : store(y + 2 * i, low, high);
  }
  if (const int64_t n = half - i; n > 0) {
    T pairs[2 * LANES] = {};
    std::memcpy(pairs, x + 2 * i, size_t(2 * n) * sizeof(T));
    vec low = load(pairs), high = load(pairs + LANES);
    turned(low, high, load_partial(cos + i, n), load_partial(sin + i, n));
    store(pairs, low, high);
    std::memcpy(y + 2 * i, pairs, size_t(2 * n) * sizeof(T));
  }
}

template <bool INTERLEAVED, class T, class Angle>
void turn_rows(const Rope& a) {
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.B * a.H * a.T * a.D, a.y == a.x);
  const Angle* cos = static_cast<const Angle*>(a.cos);
  const Angle* sin = static_cast<const Angle*>(a.sin);
  const float sign = a.back ? -1.0f : 1.0f;
  const int64_t rest = a.D - 2 * a.half;
  const bool past_caches = rest == 0 && y.rows_past_caches(a.half);
  const int64_t blocks = (a.T + POSITIONS - 1) / POSITIONS;
  parallel_rows(a.B * blocks, a.H * (a.T < POSITIONS ? a.T : POSITIONS) * a.D, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * POSITIONS;
      const int64_t last = first + POSITIONS < a.T ? first + POSITIONS : a.T;
      for (int64_t h = 0; h < a.H; ++h) {
        for (int64_t t = first; t < last; ++t) {
          const T* from = x + b * a.x_strides[0] + h * a.x_strides[1] + t * a.x_strides[2];
          T* to = y.data + ((b * a.H + h) * a.T + t) * a.D;
          const int64_t angle = b * a.angle_batch_stride + t * a.half;
          if constexpr (INTERLEAVED) {
            turn_neighbours(from, cos + angle, sin + angle, to, a.half, sign, past_caches);
          } else {
            turn_halves(from, cos + angle, sin + angle, to, a.half, sign, past_caches);
          }
          if (rest > 0 && to != from) std::memcpy(to + 2 * a.half, from + 2 * a.half, size_t(rest) * sizeof(T));
        }
      }
    }
  });
}

}  // namespace

// 3 dtypes x (float32 angles or its own) x 2 orders of pairs = 10 builds.
bool rope(const Rope& a) {
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.angle_dtype == Dtype::float32) {
      a.interleaved ? turn_rows<true, T, float>(a) : turn_rows<false, T, float>(a);
    } else {
      a.interleaved ? turn_rows<true, T, T>(a) : turn_rows<false, T, T>(a);
    }
    return true;
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
