// The operands of a product, read a vector at a time along or across the inner axis, and that axis in blocks.
#pragma once

#include <cstring>

#include "lanes.h"
#include "products.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int64_t DEPTH_BLOCK = 1024;  // lanes along the inner axis

// Lanes of the vectors that `values` neighbours fill.
template <class Products>
INLINE int64_t padded_lanes(int64_t values) {
  constexpr int64_t BLOCK = LANES * Products::VALUES;
  return (values + BLOCK - 1) / BLOCK * LANES;
}

// LANES lanes of neighbours along the inner axis.
template <class Products, class T>
INLINE vec load_lanes(const T* p) {
  if constexpr (Products::VALUES == 1) {
    return load(p);
  } else {
    vec lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
  }
}
// Of the first `values` only, zeros behind them.
template <class Products, class T>
INLINE vec load_lanes_partial(const T* p, int64_t values) {
  if (values >= LANES * Products::VALUES) return load_lanes<Products>(p);
  if constexpr (Products::VALUES == 1) {
    return load_partial(p, values);
  } else {
    vec lanes = {};
    std::memcpy(&lanes, p, size_t(values) * sizeof(T));
    return lanes;
  }
}
// One lane along the inner axis, of which `values` are there, for each of up to LANES columns, `stride` apart along it.
template <class Products, class T>
INLINE vec join_values(const T* p, int64_t stride, int64_t values, int64_t columns) {
  if constexpr (Products::VALUES == 1) {
    return columns >= LANES ? load(p) : load_partial(p, columns);
  } else {
    const size_t bytes = size_t(columns >= LANES ? LANES : columns) * sizeof(T);
    hvec low = {}, high = {};
    std::memcpy(&low, p, bytes);
    if (values > 1) std::memcpy(&high, p + stride, bytes);
    return side_by_side(low, high);
  }
}

// Rows along the inner axis: element (i, k) is data[i * row + k * depth]; one of the strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, depth;

  const T* at(int64_t i, int64_t k) const { return data + i * row + k * depth; }
  Matrix from(int64_t i, int64_t k) const { return {at(i, k), row, depth}; }
};

// body(k, values) for each block of the inner axis, at most `longest` lanes: of one length, for while one is read the
// next is fetched.
template <class Products, class F>
INLINE void for_depth_blocks(int64_t depth, int64_t longest, const F& body) {
  constexpr int64_t VECTOR = LANES * Products::VALUES;
  const int64_t blocks = (depth + longest * Products::VALUES - 1) / (longest * Products::VALUES);
  const int64_t vectors = (depth + VECTOR - 1) / VECTOR;
  const int64_t length = blocks == 0 ? 0 : (vectors + blocks - 1) / blocks * VECTOR;
  for (int64_t k = 0; k < depth; k += length) body(k, depth - k < length ? depth - k : length);
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
