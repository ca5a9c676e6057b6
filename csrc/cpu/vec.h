// The vector type that every CPU body is written over: LANES float32 values, lowered by the compiler to this level's
// registers (wide vectors are split where registers are narrow). An intrinsic stands only where the compiler's own code
// is slower, always beside the plain form that other levels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace llmcore::LLMCORE_LEVEL {
// Internal linkage for all of it: an inline function that the linker merges across levels would run one level's
// instructions on another level's machine.
namespace {

#define INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 16;
#endif

template <class Element, int N>
struct vector_of {
  typedef Element type __attribute__((vector_size(N * sizeof(Element))));
};
using vec = vector_of<float, LANES>::type;
using ivec = vector_of<int32_t, LANES>::type;
using uvec = vector_of<uint32_t, LANES>::type;
using hvec = vector_of<uint16_t, LANES>::type;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
INLINE To bits_of(From from) {
  return __builtin_bit_cast(To, from);
}

INLINE vec broadcast(float x) { return vec{} + x; }
INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }  // contracted where the level has it

// max and min give b when either is NaN, as the x86 instructions do.
INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
  return vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return vec(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
INLINE vec min(vec a, vec b) {
#if defined(__AVX512F__)
  return vec(_mm512_min_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return vec(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}

// Lanes are folded in halves, the same order at every call.
template <int N, class Fold>
INLINE float fold_lanes(typename vector_of<float, N>::type v, Fold fold) {
  if constexpr (N == 4) {
    return fold(fold(v[0], v[2]), fold(v[1], v[3]));
  } else {
    struct Halves {
      typename vector_of<float, N / 2>::type low, high;
    };
    const Halves h = bits_of<Halves>(v);
    return fold_lanes<N / 2>(fold(h.low, h.high), fold);
  }
}
INLINE float sum_lanes(vec v) {
  return fold_lanes<LANES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
INLINE float max_lanes(vec v) {
  return fold_lanes<LANES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

INLINE vec from_bits(hvec h, bfloat16) { return bits_of<vec>(__builtin_convertvector(h, uvec) << 16); }

INLINE hvec to_bits(vec v, bfloat16) {
  const uvec u = bits_of<uvec>(v);
  const uvec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uvec quiet_nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet_nan, hvec);
}

INLINE vec from_bits(hvec h, float16) {
#if defined(__AVX512F__)
  return vec(_mm512_cvtph_ps(__m256i(h)));
#elif defined(__AVX2__)
  return vec(_mm256_cvtph_ps(__m128i(h)));
#else
  // Shift exponent and mantissa into place, then multiply by 2^112 to mend the bias: exact for subnormals too.
  const uvec wide = __builtin_convertvector(h, uvec);
  const uvec magnitude = (wide & 0x7fffu) << 13;
  const vec scaled = bits_of<vec>(magnitude) * bits_of<float>(0x77800000u);
  const uvec finite = bits_of<uvec>(scaled);
  const uvec special = magnitude | 0x7f800000u;  // inf and NaN keep their mantissa
  return bits_of<vec>((magnitude >= 0x0f800000u ? special : finite) | ((wide & 0x8000u) << 16));
#endif
}

INLINE hvec to_bits(vec v, float16) {
#if defined(__AVX512F__)
  return hvec(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return hvec(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uvec u = bits_of<uvec>(v);
  const uvec sign = (u >> 16) & 0x8000u;
  const uvec magnitude = u & 0x7fffffffu;
  const uvec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a subnormal's units at the bottom of the mantissa, rounded by the addition itself.
  const uvec subnormal = bits_of<uvec>(bits_of<vec>(magnitude) + 0.5f) - 0x3f000000u;
  uvec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? uvec{} + 0x7c00u : half;  // rounds up to inf
  half = magnitude > 0x7f800000u ? uvec{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, hvec);
#endif
}

template <class T>
INLINE vec load(const T* p) {
  if constexpr (sizeof(T) == 4) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return from_bits(h, T{});
  }
}
template <class T>
INLINE void store(T* p, vec v) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, sizeof v);
  } else {
    const hvec h = to_bits(v, T{});
    std::memcpy(p, &h, sizeof h);
  }
}

// The first n < LANES values, zeros behind them; nothing is read or written past p + n.
template <class T>
INLINE vec load_partial(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) return vec(_mm512_maskz_loadu_ps(mask, p));
#endif
  T buffer[LANES] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T>
INLINE void store_partial(T* p, vec v, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, __m512(v));
    return;
  }
#endif
  T buffer[LANES];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(T));
}

template <class T>
INLINE float load_one(const T* p) {
  if constexpr (sizeof(T) == 4)
    return *p;
  else
    return load_partial(p, 1)[0];
}

// Calls body(offset, count) over [0, n) in whole vectors (count a compile-time LANES) and one partial one.
template <class Whole, class Partial>
INLINE void for_lanes(int64_t n, Whole whole, Partial partial) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) whole(i);
  if (i < n) partial(i, n - i);
}

// exp, relative error below 2 ulp on the normal range; exp(-inf) = 0, exp(NaN) = NaN, results under 2^-126 are 0.
// Range reduction by ln 2 in two parts (Cody and Waite), degree-6 minimax polynomial on [-ln2/2, ln2/2].
INLINE vec exp(vec x) {
  const vec clamped = min(broadcast(88.7228394f), max(broadcast(-104.0f), x));  // NaN passes: it is the second operand
#if defined(__AVX512F__)
  const vec n = vec(_mm512_roundscale_ps(__m512(clamped * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  const vec n = vec(_mm256_round_ps(__m256(clamped * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (clamped * 1.44269504f + shift) - shift;
#endif
  vec f = fma(n, broadcast(-0.693359375f), clamped);
  f = fma(n, broadcast(2.12194440e-4f), f);
  vec p = broadcast(1.38888889e-3f);
  p = fma(p, f, broadcast(8.33333333e-3f));
  p = fma(p, f, broadcast(4.16666667e-2f));
  p = fma(p, f, broadcast(1.66666667e-1f));
  p = fma(p, f, broadcast(0.5f));
  p = fma(p, f, broadcast(1.0f));
  p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  return vec(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  const ivec exponent = __builtin_convertvector(n, ivec);
  const vec scaled = bits_of<vec>(bits_of<ivec>(p) + (exponent << 23));
  const vec finite = x < broadcast(-87.3365447f) ? vec{} : scaled;
  return x == x ? finite : x;
#endif
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
