// C = A B^T for matrices of any size, an element at a time a dot product: ROWS x COLUMNS sums of vectors along the
// inner axis stay in registers.
//
// Many rows are bound by multiply-adds: blocks of both operands are copied into the order in which the tile reads them,
// A's to L2 and a few columns of B to L1. Few rows are bound by reading B, which then is used where it lies, once. The
// inner axis is cut into blocks, which end a sum of vectors; an element adds up its blocks in order. So its bits are a
// matter of its row of A and its row of B (a column of C) alone: not of the rows beside it, nor of the thread.
#pragma once

#include "gemm_tile.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int ROWS = REGISTERS == 32 ? 4 : 3;
constexpr int COLUMNS = 4;
constexpr int64_t DEPTH_BLOCK = 512;  // lanes along the inner axis
constexpr int64_t ROW_BLOCK = 64 * ROWS;
constexpr int64_t COLUMN_BLOCK = 512;
constexpr int64_t FEW_ROWS = 32;
constexpr int64_t AHEAD_BYTES = 32768;  // how early memory is asked for what is used where it lies, into L2
constexpr int64_t SHORT_DEPTH = 128;    // lanes
constexpr int64_t COLUMN_GROUP = LANES < COLUMNS ? COLUMNS : LANES;  // columns of B copied at once
static_assert(COLUMN_BLOCK % COLUMN_GROUP == 0 && COLUMN_GROUP % COLUMNS == 0);

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
    return bits_of<vec>(__builtin_convertvector(low, uvec) | __builtin_convertvector(high, uvec) << 16);
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

// As a tile reads it: LANES lanes of row i from data + i * row, the next ones `step` behind.
template <class T>
struct TileRows {
  const T* data;
  int64_t row, step;
  const T* ahead = nullptr;  // what is fetched meanwhile, in memory's order, as many bytes as are read
};

// Copies `rows` rows of `values` values into tiles: vectors of TILE rows side by side, then the next along the inner
// axis. Zeros fill the last vector; rows missing in the last tile are left as they are.
template <class Products, int TILE, class T>
void pack_tiles(const Matrix<T>& from, int64_t rows, int64_t values, float* to) {
  constexpr int64_t BLOCK = LANES * Products::VALUES, STEP = TILE * LANES;
  const int64_t lanes = padded_lanes<Products>(values);
  const auto row_of_tile = [&](int64_t i) { return to + i / TILE * TILE * lanes + i % TILE * LANES; };
  if (from.depth == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = from.at(i, 0);
      float* at = row_of_tile(i);
      int64_t k = 0;
      for (; k + BLOCK <= values; k += BLOCK, at += STEP) store(at, load_lanes<Products>(row + k));
      if (k < values) store(at, load_lanes_partial<Products>(row + k, values - k));
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += LANES) {
    const int64_t here = rows - i < LANES ? rows - i : LANES;
    for (int64_t k = 0; k < values; k += BLOCK) {
      const T* corner = from.at(i, k);
      const int64_t offset = k / BLOCK * STEP;
      vec block[LANES];
      if (here == LANES && values - k >= BLOCK) {
#pragma GCC unroll 16
        for (int64_t d = 0; d < LANES; ++d) {
          block[d] =
              join_values<Products>(corner + d * Products::VALUES * from.depth, from.depth, Products::VALUES, LANES);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int64_t r = 0; r < LANES; ++r) store(row_of_tile(i + r) + offset, block[r]);
      } else {
        for (int64_t d = 0; d < LANES; ++d) {
          const int64_t left = values - k - d * Products::VALUES;
          const T* row = corner + d * Products::VALUES * from.depth;
          block[d] = left > 0 ? join_values<Products>(row, from.depth, left, here) : vec{};
        }
        transpose(block);
        for (int64_t r = 0; r < here; ++r) store(row_of_tile(i + r) + offset, block[r]);
      }
    }
  }
}

// sums[r][c] (+)= A's row r times B's column c over one block of the inner axis, for R rows and C columns.
template <class Products, int R, int C, bool B_IN_PLACE, class TB>
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
    if constexpr (B_IN_PLACE) {  // each vector of B may take registers to convert, and is used once for all rows
      vec left[R];
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
    } else {
      vec right[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) right[c] = load_lanes<Products>(right_at + c * b_row);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec left = load_lanes<Products>(left_at + r * a_row);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r * C + c] = Products::add(sum[r * C + c], left, right[c]);
      }
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

// What one thread works with.
struct GemmWorkspace {
  GemmWorkspace(int64_t rows, int64_t row_values)
      : memory((rows + ROWS) * (COLUMN_BLOCK + row_values) + COLUMN_GROUP * DEPTH_BLOCK),
        sums(memory.data()),
        columns(sums + (rows + ROWS) * COLUMN_BLOCK),
        rows(columns + COLUMN_GROUP * DEPTH_BLOCK) {}
  Scratch memory;
  float *sums, *columns, *rows;
};

// body(k, values) for each block of the inner axis: of one length, for while one is read the next is fetched.
template <class Products, class F>
INLINE void for_depth_blocks(int64_t depth, const F& body) {
  constexpr int64_t VECTOR = LANES * Products::VALUES, LONGEST = DEPTH_BLOCK * Products::VALUES;
  const int64_t blocks = (depth + LONGEST - 1) / LONGEST, vectors = (depth + VECTOR - 1) / VECTOR;
  const int64_t length = blocks == 0 ? 0 : (vectors + blocks - 1) / blocks * VECTOR;
  for (int64_t k = 0; k < depth; k += length) body(k, depth - k < length ? depth - k : length);
}

// Up to ROWS rows of A, copied, and C columns of B where they lie.
template <class Products, int C, class TB>
INLINE void multiply_rows(int64_t rows, const TileRows<float>& left, const TileRows<TB>& right, int64_t values,
                          float* sums, bool onto) {
  if constexpr (ROWS == 4) {
    if (rows >= 4) return multiply_tile<Products, ROWS, C, true>(left, right, values, sums, COLUMN_BLOCK, onto);
  }
  if (rows >= 3) return multiply_tile<Products, 3, C, true>(left, right, values, sums, COLUMN_BLOCK, onto);
  if (rows == 2) return multiply_tile<Products, 2, C, true>(left, right, values, sums, COLUMN_BLOCK, onto);
  return multiply_tile<Products, 1, C, true>(left, right, values, sums, COLUMN_BLOCK, onto);
}

template <class Products, class TA>
void pack_few(const Matrix<TA>& a, int64_t rows, int64_t depth, float* to) {
  for_depth_blocks<Products>(depth, [&](int64_t k, int64_t values) {
    pack_tiles<Products, ROWS>(a.from(0, k), rows, values, to);
    to += (rows + ROWS - 1) / ROWS * ROWS * padded_lanes<Products>(values);
  });
}

// `a`: the rows of A in tiles, one block of the inner axis behind the other. B is read up to `end`.
template <class Products, class TB>
void multiply_few(const float* a, const Matrix<TB>& b, int64_t rows, int64_t columns, int64_t depth, const TB* end,
                  float* sums) {
  const auto tiles = [&](int64_t c, auto width) {
    const float* block = a;
    for_depth_blocks<Products>(depth, [&](int64_t k, int64_t values) {
      const int64_t lanes = padded_lanes<Products>(values);
      const TB* ahead = b.at(c, 0) + decltype(width)::value * k + AHEAD_BYTES / int64_t(sizeof(TB));
      if (ahead >= end) ahead = b.at(c, k);
      const TileRows<TB> right{b.at(c, k), b.row, LANES * Products::VALUES, ahead};
      for (int64_t r = 0; r < rows; r += ROWS) {
        multiply_rows<Products, decltype(width)::value>(rows - r, {block + r * lanes, LANES, ROWS * LANES}, right,
                                                        values, sums + r * COLUMN_BLOCK + c, k > 0);
      }
      block += (rows + ROWS - 1) / ROWS * ROWS * lanes;
    });
  };
  int64_t c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS) tiles(c, std::integral_constant<int, COLUMNS>{});
  for (; c < columns; ++c) tiles(c, std::integral_constant<int, 1>{});
}

template <class Products, class TA, class TB>
void multiply_many(const Matrix<TA>& a, const Matrix<TB>& b, int64_t rows, int64_t columns, int64_t depth,
                   const GemmWorkspace& w) {
  for_depth_blocks<Products>(depth, [&](int64_t k, int64_t values) {
    const int64_t lanes = padded_lanes<Products>(values);
    pack_tiles<Products, ROWS>(a.from(0, k), rows, values, w.rows);
    for (int64_t group = 0; group < columns; group += COLUMN_GROUP) {
      const int64_t end = columns - group < COLUMN_GROUP ? columns : group + COLUMN_GROUP;
      pack_tiles<Products, COLUMNS>(b.from(group, k), end - group, values, w.columns);
      for (int64_t c = group; c < end; c += COLUMNS) {
        const TileRows<float> right{w.columns + (c - group) * lanes, LANES, COLUMNS * LANES};
        for (int64_t r = 0; r < rows; r += ROWS) {
          const TileRows<float> left{w.rows + r * lanes, LANES, ROWS * LANES};
          multiply_tile<Products, ROWS, COLUMNS, false>(left, right, lanes * Products::VALUES,
                                                        w.sums + r * COLUMN_BLOCK + c, COLUMN_BLOCK, k > 0);
        }
      }
    }
  });
}

// rows of lanes: to[lane][width], `count` neighbours across the inner axis side by side, zeros behind them.
template <class Products, class T>
void pack_across(const Matrix<T>& from, int64_t count, int64_t values, int64_t width, float* to) {
  for (int64_t k = 0; k < values; k += Products::VALUES, to += width) {
    for (int64_t j = 0; j < width; j += LANES) {
      store(to + j, j < count ? join_values<Products>(from.at(j, k), from.depth, values - k, count - j) : vec{});
    }
  }
}

// A short inner axis (a weight's gradient over few rows of x), for which sums along it would take longer to fold than
// to multiply: the tiles of gemm_tile.h, whose sums lie along the columns.
template <class Products, class TA, class TB>
void multiply_short(const Matrix<TA>& a, const Matrix<TB>& b, int64_t rows, int64_t columns, int64_t depth,
                    const GemmWorkspace& w) {
  constexpr int64_t WIDTH = MatrixRows::WIDTH;
  static_assert(WIDTH * SHORT_DEPTH <= COLUMN_GROUP * DEPTH_BLOCK);
  const int64_t lanes = (depth + Products::VALUES - 1) / Products::VALUES, height = (rows + LANES - 1) / LANES * LANES;
  pack_across<Products>(a, rows, depth, height, w.rows);
  for (int64_t c = 0; c < columns; c += WIDTH) {
    const int64_t count = columns - c < WIDTH ? columns - c : WIDTH;
    pack_across<Products>(b.from(c, 0), count, depth, WIDTH, w.columns);
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t here = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      any_tile<Products>(int(here), int((count + LANES - 1) / LANES), {w.rows + r, 1, height},
                         MatrixRows{w.columns, WIDTH}, w.sums + r * COLUMN_BLOCK + c, COLUMN_BLOCK, lanes, false);
    }
  }
}

enum class Cut { as_threads_need, whole_blocks };

// C (M, N) = A B^T over threads, A (M, K), B (N, K). finish(m, n, count, sums) takes `count` neighbours of row m from
// column n: COLUMN_BLOCK of them from a multiple of it, but at the end, when they are cut in whole blocks. False when
// there was no memory.
template <class Products, class TA, class TB, class Finish>
bool gemm(int64_t M, int64_t N, int64_t K, const Matrix<TA>& a, const Matrix<TB>& b, const Finish& finish,
          Cut columns_cut = Cut::as_threads_need) {
  const bool few = M <= FEW_ROWS && b.depth == 1 && K > 0;
  const bool is_short = a.row == 1 && b.row == 1 && K <= SHORT_DEPTH * Products::VALUES;
  // A second thread pays from about 64k multiply-adds; a few tasks for each even out their lengths.
  const int64_t threads = M * N * K < 65536 ? 1 : runtime.threads();
  const int64_t row_blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK,
                rows_in_each = row_blocks == 0 ? 0 : (M - 1) / row_blocks + 1;
  const int64_t row_step = (rows_in_each + ROWS - 1) / ROWS * ROWS;
  // Few rows: a thread reads one stream, whose end is as near to the others' as small blocks allow.
  const int64_t blocks_wanted = (few ? 32 : 4) * threads;
  int64_t column_step = COLUMN_BLOCK;
  while (columns_cut == Cut::as_threads_need && column_step > COLUMN_GROUP &&
         row_blocks * ((N + column_step - 1) / column_step) < blocks_wanted) {
    column_step /= 2;
  }
  const int64_t column_blocks = (N + column_step - 1) / column_step;
  Failure no_memory;
  if (few) {
    parallel_for(column_blocks, threads == 1 ? column_blocks : 1, [&](int64_t block, int64_t end) {
      const GemmWorkspace w(M, padded_lanes<Products>(K));
      if (!w.memory.ok()) return no_memory.set();
      pack_few<Products>(a, M, K, w.rows);
      const TB* b_end = b.at(end < column_blocks ? end * column_step : N, 0);
      for (int64_t n = block * column_step; block < end; ++block, n += column_step) {
        const int64_t columns = N - n < column_step ? N - n : column_step;
        multiply_few<Products>(w.rows, b.from(n, 0), M, columns, K, b_end, w.sums);
        for (int64_t m = 0; m < M; ++m) finish(m, n, columns, w.sums + m * COLUMN_BLOCK);
      }
    });
    return !no_memory.happened();
  }
  parallel_tasks(
      row_blocks * column_blocks,
      [&](const auto& next) {
        const GemmWorkspace w(row_step, DEPTH_BLOCK);
        if (!w.memory.ok()) return no_memory.set();
        for (int64_t task = next(); task >= 0; task = next()) {
          const int64_t n = task / row_blocks * column_step, m = task % row_blocks * row_step;
          const int64_t rows = M - m < row_step ? M - m : row_step;
          const int64_t columns = N - n < column_step ? N - n : column_step;
          if (K == 0) {
            std::memset(w.sums, 0, size_t(rows * COLUMN_BLOCK) * sizeof(float));
          } else if (is_short) {
            multiply_short<Products>(a.from(m, 0), b.from(n, 0), rows, columns, K, w);
          } else {
            multiply_many<Products>(a.from(m, 0), b.from(n, 0), rows, columns, K, w);
          }
          for (int64_t r = 0; r < rows; ++r) finish(m + r, n, columns, w.sums + r * COLUMN_BLOCK);
        }
      },
      threads == 1);
  return !no_memory.happened();
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
