// The register-blocked product that attention is made of: C (+)= A B with C's tile held in registers.
//
// A is read one broadcast value at a time with any strides (so that its transpose costs nothing), B in whole vectors
// along its rows, wherever those lie. TILE_ROWS x TILE_VECS accumulators, TILE_VECS vectors of B and one of A fill the
// register file. The sum over the inner axis runs in order, one accumulator for each element of C: an element's bits do
// not depend on the tile it falls into.
#pragma once

#include "lanes.h"
#include "products.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int TILE_ROWS = 6;
constexpr int TILE_VECS = REGISTERS == 32 ? 4 : 2;

// Products added up before a sum is put aside. Without FMA each product is rounded too: there the chains are cut short,
// to lose no more bits than the other levels.
#if defined(__FMA__)
constexpr int64_t CHAIN = INT64_MAX;
#else
constexpr int64_t CHAIN = 16;
#endif

struct StridedMatrix {
  const float* data;
  int64_t row, column;  // strides in words
};

// B as rows of words, one stride apart. (Any other type with these two functions, and a width to take at once, serves
// as B.)
struct MatrixRows {
  static constexpr int64_t WIDTH = TILE_VECS * LANES;
  const float* data;
  int64_t row;
  INLINE vec at(int64_t k, int64_t column) const { return load(data + k * row + column); }
  INLINE MatrixRows from(int64_t k, int64_t column) const { return {data + k * row + column, row}; }
};

// One tile of R rows and V vectors; `depth` is the inner axis. The tile's sum starts from zero, and is added to C at
// its end when `onto`: shorter chains of additions lose fewer bits.
template <int R, int V, class Products, class B>
[[gnu::noinline]] void tile_product(StridedMatrix a, B b, float* c, int64_t c_row, int64_t depth, bool onto) {
  vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = vec{};
  const float* at = a.data;
  const int64_t a_row = a.row, a_column = a.column;
  for (int64_t k = 0; k < depth; ++k) {
    vec right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = b.at(k, v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vec left = broadcast(at[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Products::add(sum[r][v], left, right[v]);
    }
    at += a_column;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * LANES;
      store(to, onto ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int R, class Products, class B>
INLINE void tile_of_rows(int vecs, StridedMatrix a, B b, float* c, int64_t c_row, int64_t depth, bool onto) {
  if constexpr (TILE_VECS == 4) {
    if (vecs == 4) return tile_product<R, TILE_VECS, Products>(a, b, c, c_row, depth, onto);
    if (vecs == 3) return tile_product<R, TILE_VECS - 1, Products>(a, b, c, c_row, depth, onto);
  }
  if (vecs == 2) return tile_product<R, 2, Products>(a, b, c, c_row, depth, onto);
  return tile_product<R, 1, Products>(a, b, c, c_row, depth, onto);
}

template <class Products, class B>
INLINE void one_chain(int rows, int vecs, StridedMatrix a, B b, float* c, int64_t c_row, int64_t depth, bool onto) {
  switch (rows) {
    case 6:
      return tile_of_rows<6, Products>(vecs, a, b, c, c_row, depth, onto);
    case 5:
      return tile_of_rows<5, Products>(vecs, a, b, c, c_row, depth, onto);
    case 4:
      return tile_of_rows<4, Products>(vecs, a, b, c, c_row, depth, onto);
    case 3:
      return tile_of_rows<3, Products>(vecs, a, b, c, c_row, depth, onto);
    case 2:
      return tile_of_rows<2, Products>(vecs, a, b, c, c_row, depth, onto);
    default:
      return tile_of_rows<1, Products>(vecs, a, b, c, c_row, depth, onto);
  }
}

// C (rows x vecs vectors) from A (rows x depth) and B (depth x vecs vectors), for rows <= TILE_ROWS, vecs <= TILE_VECS.
template <class Products, class B>
INLINE void any_tile(int rows, int vecs, StridedMatrix a, B b, float* c, int64_t c_row, int64_t depth, bool onto) {
  for (; depth > CHAIN; depth -= CHAIN, onto = true) {
    one_chain<Products>(rows, vecs, a, b, c, c_row, CHAIN, onto);
    a.data += CHAIN * a.column;
    b = b.from(CHAIN, 0);
  }
  one_chain<Products>(rows, vecs, a, b, c, c_row, depth, onto);
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
