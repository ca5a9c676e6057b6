// Products of weights in int8 or int4 with activations in int8, four neighbours along K at a time: each int32 lane of a
// sum gains the products of its own four bytes of the weights with the same four activations. Every level gives the
// same integers; nothing saturates.
//
// Two kinds of weights, both made of bytes as they are stored:
//   Int8Quads  0 to 255, 128 more than the weight
//   Int4Quads  0 to 15
// add_to(sum, activations) adds the products with activations in -127..127 to a Sum; total(sum) makes int32 of a Sum of
// at most 32 neighbours. SURPLUS is how much too large each weight was taken: SURPLUS * (sum of the activations) is for
// the caller to take off.
#pragma once

#include "lanes.h"
#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

using bytes = vector_of<uint8_t, 4 * LANES>::type;
using svec = vector_of<int16_t, 2 * LANES>::type;

INLINE bytes load_bytes(const uint8_t* p) {
  bytes b;
  std::memcpy(&b, p, sizeof b);
  return b;
}

INLINE ivec broadcast_int(int32_t i) { return i + ivec{}; }

// Four activations, in every lane.
INLINE bytes broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return bits_of<bytes>(broadcast_int(quad));
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// Products of neighbours, added in pairs: of unsigned and signed bytes into int16, cut off at its ends; of int16.
INLINE svec pair_products(bytes a, bytes b) {
#if defined(__AVX512F__)
  return svec(_mm512_maddubs_epi16(__m512i(a), __m512i(b)));
#else
  return svec(_mm256_maddubs_epi16(__m256i(a), __m256i(b)));
#endif
}
INLINE ivec pair_products(svec a, svec b) {
#if defined(__AVX512F__)
  return ivec(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
  return ivec(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
}
INLINE ivec pair_sums(svec a) { return pair_products(a, svec{} + int16_t{1}); }

// |weight| * (activation with the weight's sign): a pair is at most 2 * 128 * 127 = 32512, where the stored bytes would
// give up to 64770, beyond int16.
struct Int8Quads {
  using Sum = ivec;
  static constexpr int32_t SURPLUS = 0;
  Int8Quads() = default;
#if defined(__AVX512F__)
  INLINE explicit Int8Quads(bytes stored)
      : magnitudes(bytes(_mm512_abs_epi8(__m512i(stored ^ 0x80)))),
        negative(_mm512_movepi8_mask(__m512i(stored ^ 0x80))) {}
  INLINE Sum add_to(Sum sum, bytes activations) const {
    const __m512i x = __m512i(activations);
    const bytes turned = bytes(_mm512_mask_sub_epi8(x, negative, __m512i{}, x));
    return sum + pair_sums(pair_products(magnitudes, turned));
  }
  bytes magnitudes;
  __mmask64 negative;
#else
  INLINE explicit Int8Quads(bytes stored)
      : weights(stored ^ 0x80), magnitudes(bytes(_mm256_abs_epi8(__m256i(weights)))) {}
  INLINE Sum add_to(Sum sum, bytes activations) const {
    const bytes turned = bytes(_mm256_sign_epi8(__m256i(activations), __m256i(weights)));
    return sum + pair_sums(pair_products(magnitudes, turned));
  }
  bytes weights, magnitudes;
#endif
  INLINE static ivec total(Sum sum) { return sum; }
};

// 32 neighbours are summed in int16: 8 quads give a lane at most 8 * 2 * 15 * 127 = 30480.
struct Int4Quads {
  using Sum = svec;
  static constexpr int32_t SURPLUS = 0;
  Int4Quads() = default;
  INLINE explicit Int4Quads(bytes stored) : weights(stored) {}
  INLINE Sum add_to(Sum sum, bytes activations) const { return sum + pair_products(weights, activations); }
  INLINE static ivec total(Sum sum) { return pair_sums(sum); }
  bytes weights;
};

#else

#if defined(__AVX512VNNI__)
INLINE ivec add_byte_products(ivec sum, bytes weights, bytes activations) {
  return ivec(_mm512_dpbusd_epi32(__m512i(sum), __m512i(weights), __m512i(activations)));
}
#else
// Products of neighbours, added in pairs.
INLINE ivec pair_products(svec a, svec b) {
#if defined(__SSE2__)
  return bits_of<ivec>(__builtin_ia32_pmaddwd128(a, b));
#else
  const auto even = [](svec s) { return bits_of<ivec>(bits_of<uvec>(s) << 16) >> 16; };
  const auto odd = [](svec s) { return bits_of<ivec>(s) >> 16; };
  return even(a) * even(b) + odd(a) * odd(b);
#endif
}
INLINE ivec add_byte_products(ivec sum, bytes weights, bytes activations) {
  using halves = vector_of<uint16_t, 2 * LANES>::type;
  const halves w = bits_of<halves>(weights), x = bits_of<halves>(activations);
  const ivec even = pair_products(bits_of<svec>(w & 0xff), bits_of<svec>(x << 8) >> 8);
  return sum + even + pair_products(bits_of<svec>(w >> 8), bits_of<svec>(x) >> 8);
}
#endif

template <int32_t TOO_LARGE>
struct UnsignedQuads {
  using Sum = ivec;
  static constexpr int32_t SURPLUS = TOO_LARGE;
  UnsignedQuads() = default;
  INLINE explicit UnsignedQuads(bytes stored) : weights(stored) {}
  INLINE Sum add_to(Sum sum, bytes activations) const { return add_byte_products(sum, weights, activations); }
  INLINE static ivec total(Sum sum) { return sum; }
  bytes weights;
};
using Int8Quads = UnsignedQuads<128>;
using Int4Quads = UnsignedQuads<0>;

#endif

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
