// Few rows, bound by reading B: it is used where it lies, once, an element of C at a time a dot product. ROWS x COLUMNS
// sums of vectors along the inner axis stay in registers, and their lanes are folded at the end of a block.
#pragma once

#include "gemm_matrix.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int ROWS = REGISTERS == 32 ? 4 : 3;
constexpr int COLUMNS = 4;
constexpr int64_t AHEAD_BYTES = 32768;  // how early memory is asked for what is used where it lies, into L2

// As a tile reads it: LANES lanes of row i from data + i * row, the next ones `step` behind.
template <class T>
struct TileRows {
  const T* data;
  int64_t row, step;
  const T* ahead = nullptr;  // what is fetched meanwhile, in memory's order, as many bytes as are read
};

// Copies `rows` rows of `values` neighbours into tiles: vectors of TILE rows side by side, then the next along the
// inner axis. Zeros fill the last vector; rows missing in the last tile are left as they are.
template <class Products, int TILE, class T>
void pack_tiles(const Matrix<T>& from, int64_t rows, int64_t values, float* to) {
  constexpr int64_t BLOCK = LANES * Products::VALUES, STEP = TILE * LANES;
  const int64_t lanes = padded_lanes<Products>(values);
  const auto row_of_tile = [&](int64_t i) { return to + i / TILE * TILE * lanes + i % TILE * LANES; };
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from.at(i, 0);
    float* at = row_of_tile(i);
    int64_t k = 0;
    for (; k + BLOCK <= values; k += BLOCK, at += STEP) store(at, load_lanes<Products>(row + k));
    if (k < values) store(at, load_lanes_partial<Products>(row + k, values - k));
  }
}

// sums[r][c] (+)= A's row r times B's column c over one block of the inner axis, for R rows and C columns.
template <class Products, int R, int C, class TB>
[[gnu::noinline]] void multiply_tile(const TileRows<float>& a, const TileRows<TB>& b, int64_t values, float* sums,
                                     int64_t sums_row, bool onto) {
  constexpr int COUNT = (R * C + LANES - 1) / LANES * LANES;
  vec sum[COUNT];
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) sum[i] = vec{};
  const float* left_at = a.data;
  const TB* right_at = b.data;
  const int64_t a_row = a.row, b_row = b.row;
  const char* ahead = reinterpret_cast<const char*>(b.ahead);
  constexpr int64_t FETCHED = C * LANES * Products::VALUES * int64_t(sizeof(TB));  // bytes in each turn
  for (; values >= LANES * Products::VALUES;
       values -= LANES * Products::VALUES, left_at += a.step, right_at += b.step) {
    vec left[R];  // each vector of B may take registers to convert, and is used once for all rows
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load_lanes<Products>(left_at + r * a_row);
#pragma GCC unroll 8
    for (int line = 0; line < FETCHED; line += CACHE_LINE) __builtin_prefetch(ahead + line, 0, 2);
    ahead += FETCHED;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const vec right = load_lanes<Products>(right_at + c * b_row);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * C + c] = Products::add(sum[r * C + c], left[r], right);
    }
  }
  if (values > 0) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vec left = load_lanes<Products>(left_at + r * a_row);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const vec right = load_lanes_partial<Products>(right_at + c * b_row, values);
        sum[r * C + c] = Products::add(sum[r * C + c], left, right);
      }
    }
  }
  float total[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i += LANES) {
    vec group[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) group[j] = sum[i + j];
    store(total + i, sum_lanes_of_each(group));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* row = sums + r * sums_row;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) row[c] = onto ? row[c] + total[r * C + c] : total[r * C + c];
  }
}

// Up to ROWS rows of A, copied, and C columns of B where they lie.
template <class Products, int C, class TB>
INLINE void multiply_rows(int64_t rows, const TileRows<float>& left, const TileRows<TB>& right, int64_t values,
                          float* sums, int64_t sums_row, bool onto) {
  if constexpr (ROWS == 4) {
    if (rows >= 4) return multiply_tile<Products, ROWS, C>(left, right, values, sums, sums_row, onto);
  }
  if (rows >= 3) return multiply_tile<Products, 3, C>(left, right, values, sums, sums_row, onto);
  if (rows == 2) return multiply_tile<Products, 2, C>(left, right, values, sums, sums_row, onto);
  return multiply_tile<Products, 1, C>(left, right, values, sums, sums_row, onto);
}

template <class Products, class TA>
void pack_few(const Matrix<TA>& a, int64_t rows, int64_t depth, float* to) {
  for_depth_blocks<Products>(depth, DEPTH_BLOCK, [&](int64_t k, int64_t values) {
    pack_tiles<Products, ROWS>(a.from(0, k), rows, values, to);
    to += (rows + ROWS - 1) / ROWS * ROWS * padded_lanes<Products>(values);
  });
}

// `a`: the rows of A in tiles, one block of the inner axis behind the other. B is read up to `end`.
template <class Products, class TB>
void multiply_few(const float* a, const Matrix<TB>& b, int64_t rows, int64_t columns, int64_t depth, const TB* end,
                  float* sums, int64_t sums_row) {
  const auto tiles = [&](int64_t c, auto width) {
    const float* block = a;
    for_depth_blocks<Products>(depth, DEPTH_BLOCK, [&](int64_t k, int64_t values) {
      const int64_t lanes = padded_lanes<Products>(values);
      const TB* ahead = b.at(c, 0) + decltype(width)::value * k + AHEAD_BYTES / int64_t(sizeof(TB));
      if (ahead >= end) ahead = b.at(c, k);
      const TileRows<TB> right{b.at(c, k), b.row, LANES * Products::VALUES, ahead};
      for (int64_t r = 0; r < rows; r += ROWS) {
        multiply_rows<Products, decltype(width)::value>(rows - r, {block + r * lanes, LANES, ROWS * LANES}, right,
                                                        values, sums + r * sums_row + c, sums_row, k > 0);
      }
      block += (rows + ROWS - 1) / ROWS * ROWS * lanes;
    });
  };
  int64_t c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS) tiles(c, std::integral_constant<int, COLUMNS>{});
  for (; c < columns; ++c) tiles(c, std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
