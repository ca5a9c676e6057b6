// What goes across the lanes of a vector: folds to one value, shuffles of two vectors, transposition.
#pragma once

#include <utility>

#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <int N>
struct Halves {
  typename vector_of<float, N / 2>::type low, high;
};
template <int N, size_t... I>
INLINE Halves<N> halves_of(typename vector_of<float, N>::type v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return {__builtin_shufflevector(v, v, int(I)...), __builtin_shufflevector(v, v, int(N / 2 + I)...)};
#else
  return bits_of<Halves<N>>(v);  // which goes through memory
#endif
}
// Lanes are folded in halves, the same order at every call.
template <int N, class Fold>
INLINE float fold_lanes(typename vector_of<float, N>::type v, Fold fold) {
  if constexpr (N == 4) {
    return fold(fold(v[0], v[2]), fold(v[1], v[3]));
  } else {
    const Halves<N> halves = halves_of<N>(v, std::make_index_sequence<N / 2>{});
    return fold_lanes<N / 2>(fold(halves.low, halves.high), fold);
  }
}
INLINE float sum_lanes(vec v) {
  return fold_lanes<LANES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
INLINE float max_lanes(vec v) {
  return fold_lanes<LANES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// Lane i of the result is lane source(i) of the 2 * LANES values of a and b.
template <int (*source)(int), size_t... I>
INLINE vec shuffle(vec a, vec b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, source(int(I))...);
#else
  return __builtin_shuffle(a, b, ivec{source(int(I))...});
#endif
}
template <int (*source)(int)>
INLINE vec shuffle(vec a, vec b) {
  return shuffle<source>(a, b, std::make_index_sequence<LANES>{});
}

// Of each 2 * HALF lanes of a and b the lower halves side by side, or the upper ones.
template <int HALF>
constexpr int lower_halves(int lane) {
  return lane & HALF ? LANES + lane - HALF : lane;
}
template <int HALF>
constexpr int upper_halves(int lane) {
  return lower_halves<HALF>(lane) + HALF;
}
// Lane i is the sum of rows[i]'s lanes, with the bits of sum_lanes.
template <int HALF = LANES / 2>
INLINE vec sum_lanes_of_each(vec (&rows)[LANES]) {
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) {
    const vec a = rows[i], b = rows[i + HALF];
    rows[i] = shuffle<lower_halves<HALF>>(a, b) + shuffle<upper_halves<HALF>>(a, b);
  }
  if constexpr (HALF > 1) return sum_lanes_of_each<HALF / 2>(rows);
  return rows[0];
}

// Integers: lanes meet those DISTANCE away, half as far each time, until every lane holds the whole.
template <int DISTANCE>
constexpr int lane_away(int lane) {
  return lane ^ DISTANCE;
}
template <int DISTANCE, class Fold>
INLINE ivec fold_all_lanes(ivec v, Fold fold) {
  if constexpr (DISTANCE == 0) {
    return v;
  } else {
    const vec lanes = bits_of<vec>(v);
    const ivec others = bits_of<ivec>(shuffle<lane_away<DISTANCE>>(lanes, lanes));
    return fold_all_lanes<DISTANCE / 2>(fold(v, others), fold);
  }
}
INLINE int32_t sum_lanes(ivec v) {
  return fold_all_lanes<LANES / 2>(v, [](ivec a, ivec b) __attribute__((always_inline)) { return a + b; })[0];
}
INLINE int32_t max_lanes(ivec v) {
  return fold_all_lanes<LANES / 2>(v, [](ivec a, ivec b) __attribute__((always_inline)) { return a > b ? a : b; })[0];
}

// The even and the odd lanes of the 2 * LANES values of a and b, and back.
constexpr int even_lanes(int lane) { return 2 * lane; }
constexpr int odd_lanes(int lane) { return 2 * lane + 1; }
constexpr int low_pairs(int lane) { return lane / 2 + lane % 2 * LANES; }
constexpr int high_pairs(int lane) { return low_pairs(lane) + LANES / 2; }
INLINE void split_pairs(vec a, vec b, vec& even, vec& odd) {
  even = shuffle<even_lanes>(a, b);
  odd = shuffle<odd_lanes>(a, b);
}
INLINE void join_pairs(vec even, vec odd, vec& a, vec& b) {
  a = shuffle<low_pairs>(even, odd);
  b = shuffle<high_pairs>(even, odd);
}

// Lane i holds low[i] below and high[i] above.
template <size_t... I>
INLINE vec side_by_side(hvec low, hvec high, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const hpair both = joined(low, high);
  return bits_of<vec>(__builtin_shufflevector(both, both, int(I / 2 + I % 2 * LANES)...));
#else
  return bits_of<vec>(__builtin_convertvector(low, uvec) | __builtin_convertvector(high, uvec) << 16);
#endif
}
INLINE vec side_by_side(hvec low, hvec high) { return side_by_side(low, high, std::make_index_sequence<2 * LANES>{}); }

// Pieces of WIDTH lanes taken from a and b in turn, within each four lanes: the first half of each four, or the second.
template <int WIDTH, int SECOND>
constexpr int interleaved(int lane) {
  return lane / 4 * 4 + SECOND * 2 + lane % 4 / (2 * WIDTH) * WIDTH + lane % WIDTH + lane / WIDTH % 2 * LANES;
}
template <int WIDTH, int SECOND>
INLINE vec interleave(vec a, vec b) {
  return shuffle<interleaved<WIDTH, SECOND>>(a, b);
}
// Every other four lanes, of a and then of b.
template <int SECOND>
constexpr int alternate(int lane) {
  return lane / 4 * 8 + SECOND * 4 + lane % 4;
}
template <int SECOND>
INLINE vec alternate_fours(vec a, vec b) {
  return shuffle<alternate<SECOND>>(a, b);
}

// In place: lane j of rows[i] and lane i of rows[j] change places. First squares of four by four, then those: each step
// is one instruction that needs no table of lanes.
INLINE void transpose(vec (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    const vec a = interleave<1, 0>(rows[i], rows[i + 1]), b = interleave<1, 1>(rows[i], rows[i + 1]);
    const vec c = interleave<1, 0>(rows[i + 2], rows[i + 3]), d = interleave<1, 1>(rows[i + 2], rows[i + 3]);
    rows[i] = interleave<2, 0>(a, c), rows[i + 1] = interleave<2, 1>(a, c);
    rows[i + 2] = interleave<2, 0>(b, d), rows[i + 3] = interleave<2, 1>(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if constexpr (LANES == 8) {
      const vec a = rows[i], b = rows[i + 4];
      rows[i] = alternate_fours<0>(a, b), rows[i + 4] = alternate_fours<1>(a, b);
    } else if constexpr (LANES == 16) {
      const vec a = rows[i], b = rows[i + 4], c = rows[i + 8], d = rows[i + 12];
      const vec even_ab = alternate_fours<0>(a, b), odd_ab = alternate_fours<1>(a, b);
      const vec even_cd = alternate_fours<0>(c, d), odd_cd = alternate_fours<1>(c, d);
      rows[i] = alternate_fours<0>(even_ab, even_cd), rows[i + 8] = alternate_fours<1>(even_ab, even_cd);
      rows[i + 4] = alternate_fours<0>(odd_ab, odd_cd), rows[i + 12] = alternate_fours<1>(odd_ab, odd_cd);
    }
  }
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
