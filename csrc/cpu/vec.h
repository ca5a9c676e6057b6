// The vector type that every CPU body is written over: LANES float32 values, lowered by the compiler to this level's
// registers (wide vectors are split where registers are narrow). An intrinsic stands only where the compiler's own code
// is slower, always beside the plain form that other levels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace llmcore::LLMCORE_LEVEL {
// Internal linkage for all of it: an inline function that the linker merges across levels would run one level's
// instructions on another level's machine.
namespace {

constexpr int64_t CACHE_LINE = 64;

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
using cvec = vector_of<int8_t, LANES>::type;
using hpair = vector_of<uint16_t, 2 * LANES>::type;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
// A bfloat16 that is multiplied by float32 values, never in pairs.
struct lone_bfloat16 : bfloat16 {};

template <class To, class From>
INLINE To bits_of(From from) {
  return __builtin_bit_cast(To, from);
}

INLINE hpair joined(hvec low, hvec high) {
  struct Halves {
    hvec low, high;
  };
  return bits_of<hpair>(Halves{low, high});
}

INLINE vec broadcast(float x) { return x - vec{}; }  // x - 0 is x for -0 too, and is folded away
// The only place where a product and a sum are rounded once: the build contracts nothing by itself (-ffp-contract=off),
// so that a - b is 0 where a and b were computed alike.
INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

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

INLINE vec absolute(vec v) { return bits_of<vec>(bits_of<uvec>(v) & 0x7fffffffu); }

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

// (Of vectors of 256 bits GCC widens each half by itself.)
INLINE uvec widened(hvec h) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return uvec(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, uvec);
#endif
}
INLINE vec from_bits(hvec h, bfloat16) { return bits_of<vec>(widened(h) << 16); }

#if defined(__AVX512F__)
INLINE bool has_subnormals(vec v) { return _mm512_fpclass_ps_mask(__m512(v), 0x20) != 0; }
#endif

// The bits of a bfloat16 in each lane's upper half: to nearest, ties to even; a NaN is made quiet. The lower half is
// anything.
INLINE uvec bfloat16_above(vec v) {
  const uvec u = bits_of<uvec>(v);
  const uvec rounded = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(__m512(v), __m512(v), _CMP_UNORD_Q);
  return uvec(_mm512_mask_or_epi32(__m512i(rounded), nan, __m512i(u), _mm512_set1_epi32(0x400000)));
#else
  return v == v ? rounded : u | 0x400000u;
#endif
}

INLINE hvec to_bits(vec v, bfloat16) {
#if defined(__AVX512BF16__)
  if (!has_subnormals(v)) return hvec(_mm512_cvtneps_pbh(__m512(v)));  // which takes them for 0
#endif
  const uvec bits = bfloat16_above(v) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  return hvec(_mm_packus_epi32(_mm256_castsi256_si128(__m256i(bits)), _mm256_extracti128_si256(__m256i(bits), 1)));
#else
  return __builtin_convertvector(bits, hvec);
#endif
}

INLINE vec from_bits(hvec h, float16) {
#if defined(__AVX512F__)
  return vec(_mm512_cvtph_ps(__m256i(h)));
#elif defined(__AVX2__)
  return vec(_mm256_cvtph_ps(__m128i(h)));
#else
  // Shift exponent and mantissa into place, then multiply by 2^112 to mend the bias: exact for subnormals too.
  const uvec wide = widened(h);
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

// The bits of 2 * LANES values at once, which costs less than twice those of LANES.
INLINE hpair to_bits(vec a, vec b, bfloat16) {
#if defined(__AVX512BF16__)
  if (!has_subnormals(a) && !has_subnormals(b)) return hpair(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
#endif
  const uvec low = bfloat16_above(a), high = bfloat16_above(b);
#if defined(__AVX512F__)
  hpair upper_halves;
  for (int i = 0; i < 2 * LANES; ++i) upper_halves[i] = uint16_t(2 * i + 1);
  return hpair(_mm512_permutex2var_epi16(__m512i(low), __m512i(upper_halves), __m512i(high)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(__m256i(low >> 16), __m256i(high >> 16));
  return hpair(_mm256_permute4x64_epi64(packed, 0xd8));  // packed by 128 bits: a, b, a, b
#else
  return joined(__builtin_convertvector(low >> 16, hvec), __builtin_convertvector(high >> 16, hvec));
#endif
}
INLINE hpair to_bits(vec a, vec b, float16) { return joined(to_bits(a, float16{}), to_bits(b, float16{})); }

// Integers that int8 holds.
INLINE vec from_bits(cvec integers, int8_t) {
#if defined(__AVX512F__)
  return __builtin_convertvector(ivec(_mm512_cvtepi8_epi32(__m128i(integers))), vec);
#elif defined(__AVX2__)
  return __builtin_convertvector(ivec(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits_of<int64_t>(integers)))), vec);
#else
  return __builtin_convertvector(integers, vec);
#endif
}

INLINE cvec to_bits(vec v, int8_t) { return __builtin_convertvector(__builtin_convertvector(v, ivec), cvec); }
INLINE vector_of<int8_t, 2 * LANES>::type to_bits(vec a, vec b, int8_t) {
  struct Halves {
    cvec low, high;
  };
  return bits_of<vector_of<int8_t, 2 * LANES>::type>(Halves{to_bits(a, int8_t{}), to_bits(b, int8_t{})});
}

template <class T>
INLINE vec load(const T* p) {
  if constexpr (sizeof(T) == 4) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    std::conditional_t<sizeof(T) == 1, cvec, hvec> bits;
    std::memcpy(&bits, p, sizeof bits);
    return from_bits(bits, T{});
  }
}
template <class T>
INLINE void store(T* p, vec v) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, sizeof v);
  } else {
    const auto bits = to_bits(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// 2 * LANES values.
template <class T>
INLINE void store(T* p, vec a, vec b) {
  if constexpr (sizeof(T) == 4) {
    store(p, a);
    store(p + LANES, b);
  } else {
    const auto bits = to_bits(a, b, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// A store that leaves the caches alone; `p` is aligned to what is stored. Such stores are ordered by order_stores only.
template <class Vector>
INLINE void bits_past_caches(void* p, Vector v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), __m512i(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), __m256i(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(p), __m128i(v));
#endif
  std::memcpy(p, &v, sizeof v);
}
template <class T>
INLINE void store_past_caches(T* p, vec v) {
  if constexpr (sizeof(T) == 4) {
    bits_past_caches(p, v);
  } else {
    bits_past_caches(p, to_bits(v, T{}));
  }
}
template <class T>
INLINE void store_past_caches(T* p, vec a, vec b) {
  if constexpr (sizeof(T) == 4) {
    bits_past_caches(p, a);
    bits_past_caches(p + LANES, b);
  } else {
    bits_past_caches(p, to_bits(a, b, T{}));
  }
}
INLINE void order_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// sum + a0 * b0 + a1 * b1, where each lane of a and b holds the bits of two bfloat16. HAS_BFLOAT16_PAIRS: the CPU has
// an instruction for it.
#if defined(__AVX512BF16__)
constexpr bool HAS_BFLOAT16_PAIRS = true;
INLINE vec add_pair_products(vec sum, vec a, vec b) {
  return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}
// Rounds to bfloat16; subnormals may become 0.
INLINE void store_weights(bfloat16* p, vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
  std::memcpy(p, &rounded, sizeof rounded);
}
// The same side by side: what add_pair_products takes.
INLINE vec round_to_pairs(vec even, vec odd) {
  hpair lanes;
  for (int i = 0; i < 2 * LANES; ++i) lanes[i] = uint16_t(i / 2 + (i % 2) * LANES);
  return vec(_mm512_permutexvar_epi16(__m512i(lanes), __m512i(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even)))));
}
#else
constexpr bool HAS_BFLOAT16_PAIRS = false;
INLINE void store_weights(bfloat16* p, vec v) { store(p, v); }
INLINE vec round_to_pairs(vec even, vec odd) {
  return bits_of<vec>(widened(to_bits(even, bfloat16{})) | widened(to_bits(odd, bfloat16{})) << 16);
}
INLINE vec add_pair_products(vec sum, vec a, vec b) {
  const auto even = [](vec v) { return bits_of<vec>(bits_of<uvec>(v) << 16); };
  const auto odd = [](vec v) { return bits_of<vec>(bits_of<uvec>(v) & 0xffff0000u); };
  return fma(odd(a), odd(b), fma(even(a), even(b), sum));
}
#endif

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

// v in the first n lanes, `fill` behind them.
INLINE vec first_lanes(vec v, int64_t n, float fill) {
  ivec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return lane < int32_t(n) ? v : broadcast(fill);
}

// To the nearest integer, ties to even; |x| < 2^22.
INLINE vec round(vec x) {
#if defined(__AVX512F__)
  return vec(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return vec(_mm256_round_ps(__m256(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const float shift = 12582912.0f;  // 1.5 * 2^23: no fraction bits are left beside it
  return (x + shift) - shift;
#endif
}

// p * 2^n for whole n and p near 1; lanes whose result is no normal number are marked `tiny` and may give 0. A NaN in
// both goes through: what n converts to is 0 or the least integer, whose lower bits are 0.
INLINE vec scale_by_power(vec p, vec n, ivec tiny) {
#if defined(__AVX512F__)
  (void)tiny;
  return vec(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  const ivec exponent = __builtin_convertvector(n, ivec);
  const vec scaled = bits_of<vec>(bits_of<uvec>(p) + (bits_of<uvec>(exponent) << 23));
  return tiny ? vec{} : scaled;
#endif
}

// exp, relative error below 3 ulp on the normal range; exp(-inf) = 0, NaN goes through, results under 2^-126 may be 0,
// and x above 88.72 counts as 88.72. Range reduction by ln 2 in two parts (Cody and Waite), then a polynomial of degree
// 5 on [-ln2/2, ln2/2] fitted to the least maximal relative error, 1.05e-7.
INLINE vec exp(vec x) {
  const vec clamped = min(broadcast(88.7228394f), max(broadcast(-104.0f), x));  // NaN passes: it is the second operand
  const vec n = round(clamped * 1.44269504f);
  vec f = fma(n, broadcast(-0.693359375f), clamped);
  f = fma(n, broadcast(2.12194440e-4f), f);
  vec p = broadcast(8.31252016e-3f);
  p = fma(p, f, broadcast(4.18901568e-2f));
  p = fma(p, f, broadcast(0.166671146f));
  p = fma(p, f, broadcast(0.499992315f));
  p = fma(p, f, broadcast(1.0f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, n, x < -87.3365447f);
}

// 2^f for |f| <= 1/2, relative error below 3 ulp.
INLINE vec exp2_polynomial(vec f) {
  vec p = broadcast(1.32646999e-3f);
  p = fma(p, f, broadcast(9.6715339e-3f));
  p = fma(p, f, broadcast(5.550734e-2f));
  p = fma(p, f, broadcast(0.240222418f));
  p = fma(p, f, broadcast(0.693146977f));
  return fma(p, f, broadcast(1.0f));
}

// 2^x for x <= 127, relative error below 3 ulp; 2^-inf = 0, NaN goes through, results under 2^-126 may be 0.
INLINE vec exp2(vec x) {
  const vec clamped = max(broadcast(-150.0f), x);  // NaN passes: it is the second operand
  const vec n = round(clamped);
  return scale_by_power(exp2_polynomial(clamped - n), n, x < -126.0f);
}

// exp for x <= 0 (a difference to a maximum), cheaper by the care that larger x take: relative error below 3 ulp for
// x > -8 and growing to 1.4e-6 at -87; exp(-inf) = 0, NaN goes through, results under 2^-126 may be 0.
INLINE vec exp_not_positive(vec x) {
#if !defined(__AVX2__)
  return exp(x);  // a product that is rounded before the difference would lose bits
#endif
  const vec clamped = max(broadcast(-104.0f), x);  // NaN passes: it is the second operand
  const vec n = round(clamped * 1.44269504f);
  const vec f = fma(clamped, broadcast(1.44269504f), -n);
  return scale_by_power(exp2_polynomial(f), n, x < -87.3365447f);
}

constexpr float TANH_SERIES[6] = {-0.333333304f, 0.13333187f,     -0.0539440281f,
                                  0.0216843579f, -0.00813439293f, 0.0021017326f};

// tanh, relative error below 4 ulp: an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) cancels.
INLINE vec tanh(vec x) {
  const vec size = absolute(x);
  const vec far = 1.0f - 2.0f / (exp(size * 2.0f) + 1.0f);
  const vec square = x * x;
  vec p = broadcast(TANH_SERIES[5]);
  for (int i = 4; i >= 0; --i) p = fma(p, square, broadcast(TANH_SERIES[i]));
  const vec near = fma(x * square, p, x);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// exp(-x), inf below -88.72, where exp alone stays finite; NaN goes through.
INLINE vec exp_minus(vec x) { return x < -88.7228394f ? broadcast(INFINITY) : exp(-x); }
// What sigmoid divides by.
INLINE vec one_plus_exp_minus(vec x) { return 1.0f + exp_minus(x); }

struct Sigmoid {
  vec value, complement;  // sigmoid(x) and 1 - sigmoid(x), neither by a difference that cancels
};
INLINE Sigmoid sigmoid_of(vec x) {
  const vec e = exp_minus(x), value = 1.0f / (1.0f + e);
  return {value, x > 0.0f ? e * value : 1.0f - value};
}

// P(s) / Q(s) = exp(s^2 / 2) * Phi(-s) on [0, 14], Phi the normal distribution function.
constexpr float NORMAL_TAIL_P[5] = {0.5f, 0.437250197f, 0.182461292f, 0.0403723717f, 0.00407758262f};
constexpr float NORMAL_TAIL_Q[6] = {1.0f, 1.67238533f, 1.19928849f, 0.467427671f, 0.101205342f, 0.0102208555f};

// Phi(x) = (1 + erf(x / sqrt(2))) / 2 and exp(-x^2 / 2), which its slope needs. The tail of Phi is a rational function
// of degree 4 over 5, fitted to the least maximal relative error, 5.6e-9, so that nothing cancels for negative x
// either. NaN goes through.
struct Normal {
  vec distribution, exp_of_minus_half_square;
};
INLINE Normal normal_of(vec x) {
  const vec size = min(broadcast(14.0f), absolute(x));  // NaN passes: it is the second operand
  const vec e = exp_not_positive(x * x * -0.5f);
  vec p = broadcast(NORMAL_TAIL_P[4]), q = broadcast(NORMAL_TAIL_Q[5]);
  for (int i = 3; i >= 0; --i) p = fma(p, size, broadcast(NORMAL_TAIL_P[i]));
  for (int i = 4; i >= 0; --i) q = fma(q, size, broadcast(NORMAL_TAIL_Q[i]));
  const vec tail = e * p / q;
  return {bits_of<ivec>(x) < 0 ? tail : 1.0f - tail, e};  // by the sign's bit, which needs no comparison
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
