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

// (The compiler's own way is through memory, whose two stores a load as wide as both cannot be forwarded from.)
INLINE hpair joined(hvec low, hvec high) {
#if defined(__AVX512F__)
  return hpair(_mm512_inserti64x4(_mm512_castsi256_si512(__m256i(low)), __m256i(high), 1));
#elif defined(__AVX2__)
  return hpair(_mm256_set_m128i(__m128i(high), __m128i(low)));
#else
  struct Halves {
    hvec low, high;
  };
  return bits_of<hpair>(Halves{low, high});
#endif
}

#if defined(__AVX2__)
constexpr bool HAS_FMA = true;
#else
constexpr bool HAS_FMA = false;  // fma rounds the product, too
#endif

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

// (GCC widens each half of a vector by itself.)
INLINE uvec widened(hvec h) {
#if defined(__AVX512F__)
  return uvec(_mm512_cvtepu16_epi32(__m256i(h)));
#elif defined(__AVX2__)
  return uvec(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, uvec);
#endif
}
INLINE vec from_bits(hvec h, bfloat16) { return bits_of<vec>(widened(h) << 16); }

#if defined(__AVX512F__)
INLINE bool has_subnormals(vec v) { return _mm512_fpclass_ps_mask(__m512(v), 0x20) != 0; }
#endif

// The bits of a bfloat16 in each lane's upper half: to nearest, ties to even; the lower half is anything. A NaN may
// become another value.
INLINE uvec number_above(vec v) {
  const uvec u = bits_of<uvec>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}
// number_above(v), `rounded`, with the NaN of v, made quiet.
INLINE uvec with_nan(uvec rounded, vec v) {
  const uvec u = bits_of<uvec>(v);
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
  const uvec bits = with_nan(number_above(v), v) >> 16;
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

// False where neither holds a NaN and asking costs less than minding each lane.
INLINE bool may_hold_nan(vec a, vec b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_movemask_ps(_mm256_cmp_ps(__m256(a), __m256(b), _CMP_UNORD_Q)) != 0;
#else
  (void)a, (void)b;
  return true;
#endif
}

// The bits of 2 * LANES values at once, which costs less than twice those of LANES.
INLINE hpair to_bits(vec a, vec b, bfloat16) {
#if defined(__AVX512BF16__)
  if (!has_subnormals(a) && !has_subnormals(b)) return hpair(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
#endif
  uvec low = number_above(a), high = number_above(b);
  if (may_hold_nan(a, b)) low = with_nan(low, a), high = with_nan(high, b);
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

// The first n < LANES values, zeros behind them; nothing is read or written past p + n. Pieces are put together in
// registers: a buffer that is written in pieces and read as a whole has to reach the cache in between.
#if defined(__AVX512F__)
INLINE __mmask16 first_of(int64_t n) { return __mmask16((1u << n) - 1u); }
template <class T>
INLINE vec load_partial(const T* p, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    return vec(_mm512_maskz_loadu_ps(first_of(n), p));
  } else if constexpr (sizeof(T) == 1) {
    return from_bits(cvec(_mm_maskz_loadu_epi8(first_of(n), p)), T{});
  } else {
    return from_bits(hvec(_mm256_maskz_loadu_epi16(first_of(n), p)), T{});
  }
}
template <class T>
INLINE void store_partial(T* p, vec v, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, first_of(n), __m512(v));
  } else if constexpr (sizeof(T) == 1) {
    _mm_mask_storeu_epi8(p, first_of(n), __m128i(to_bits(v, T{})));
  } else {
    _mm256_mask_storeu_epi16(p, first_of(n), __m256i(to_bits(v, T{})));
  }
}
#else
// The first `bytes`, an even number, of eight; zeros behind them.
INLINE uint64_t partial_word(const void* p, int64_t bytes) {
  const char* from = static_cast<const char*>(p);
  if (bytes <= 0) return 0;
  uint64_t word = 0;
  if (bytes >= 8) {
    std::memcpy(&word, from, 8);
    return word;
  }
  const int64_t four = bytes & 4;
  if (four) {
    uint32_t low;
    std::memcpy(&low, from, 4);
    word = low;
  }
  if (bytes & 2) {
    uint16_t last;
    std::memcpy(&last, from + four, 2);
    word |= uint64_t(last) << (8 * four);
  }
  return word;
}
// Eight bytes, or sixteen.
INLINE uint64_t partial_words(const void* p, int64_t bytes, uint64_t) { return partial_word(p, bytes); }
using two_words = vector_of<uint64_t, 2>::type;
INLINE two_words partial_words(const void* p, int64_t bytes, two_words) {
  return two_words{partial_word(p, bytes), partial_word(static_cast<const char*>(p) + (bytes > 8 ? 8 : 0), bytes - 8)};
}
template <class T>
INLINE vec load_partial(const T* p, int64_t n) {
  const int64_t bytes = n * int64_t(sizeof(T));
  if constexpr (sizeof(T) == 1) {
    cvec integers = {};
    std::memcpy(&integers, p, size_t(n));
    return from_bits(integers, T{});
  } else if constexpr (sizeof(T) < 4) {
    using bits = std::conditional_t<sizeof(hvec) == 8, uint64_t, two_words>;
    return from_bits(bits_of<hvec>(partial_words(p, bytes, bits{})), T{});
  }
#if defined(__AVX2__)
  ivec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return vec(_mm256_maskload_ps(reinterpret_cast<const float*>(p), __m256i(lane < int32_t(n))));
#else
  return bits_of<vec>(partial_words(p, bytes, two_words{}));
#endif
}
template <class T>
INLINE void store_partial(T* p, vec v, int64_t n) {
  T buffer[LANES];
  store(buffer, v);
  const T* from = buffer;
#pragma GCC unroll 4
  for (int64_t count = LANES / 2; count >= 1; count /= 2) {
    if (!(n & count)) continue;
    std::memcpy(p, from, size_t(count) * sizeof(T));
    p += count, from += count;
  }
}
#endif

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

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
