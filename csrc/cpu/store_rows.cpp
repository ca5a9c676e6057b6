// store_rows: keys and values as a cache keeps them; rows over threads.
//
// A row is read from memory once: 1 read of 4 bytes and a write of 1, 2 or 4 for each element. Bound by memory.
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// max|x| / 127; NaN when something is not finite.
INLINE float scale_of(const float* x, int64_t width) {
  vec largest = {}, nonfinite = {};
  for_vectors(width, [&](auto at) __attribute__((always_inline)) {
    const vec v = at(x);
    largest = max(absolute(v), largest);
    nonfinite += v - v;
  });
  return sum_lanes(nonfinite) == 0.0f ? max_lanes(largest) / 127.0f : NAN;
}

float quantize(const float* x, int64_t width, int8_t* y) {
  const float scale = scale_of(x, width);
  if (!(scale > 0.0f)) {
    std::memset(y, 0, size_t(width));
    return scale;
  }
  const vec most = broadcast(127.0f);  // for where the scale is subnormal, and coarse
  const auto integers = [=](vec v) { return round(min(max(v / scale, -most), most)); };
  map_row(y, width, integers, x);
  return scale;
}

// body(the offsets of a row in x, y and scale) for every row.
template <class F>
void for_rows(const StoreRows& a, const F& body) {
  parallel_rows(a.B * a.G * a.T, a.D, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t place[3] = {r / a.T / a.G, r / a.T % a.G, r % a.T};
      const auto at = [&](const int64_t (&strides)[3]) {
        return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2];
      };
      body(at(a.x_strides), at(a.y_strides), at(a.scale_strides));
    }
  });
}

}  // namespace

bool store_rows(const StoreRows& a) {
  const auto convert = [&](auto* y) {
    for_rows(a, [&](int64_t from, int64_t to, int64_t) { map_row(y + to, a.D, [](vec v) { return v; }, a.x + from); });
  };
  if (a.kv_dtype == KvDtype::same) {
    convert(static_cast<float*>(a.y));
  } else if (a.kv_dtype == KvDtype::bfloat16) {
    convert(static_cast<bfloat16*>(a.y));
  } else {
    for_rows(a, [&](int64_t from, int64_t to, int64_t scale) {
      a.scale[scale] = quantize(a.x + from, a.D, static_cast<int8_t*>(a.y) + to);
    });
  }
  return true;
}

}  // namespace llmcore::LLMCORE_LEVEL
