// linear with a weight in int8 or int4: x is rounded to int8 once, then each thread takes panels of 16 outputs, and in
// a panel tiles of rows.
//
// A tile keeps its sums in registers, one lane for each output, so that nothing is summed across lanes: a vector of
// weights is loaded once for all rows, four activations at a time are broadcast to all outputs. One row is bound by
// reading the weight, which lies in memory in the order in which it is read; many rows by the products, to which each
// chunk of 32 neighbours adds two operations in float32. A panel comes from memory once, for further tiles from L2.
// An output's sum has one order whatever the number of rows: its bits do not depend on the batch.
#include <cfloat>

#include "parallel.h"
#include "quad_products.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int PANEL = 16;
constexpr int PANEL_VECS = PANEL / LANES;
constexpr int BLOCK = 4 * PANEL;          // bytes
constexpr int TILE_ROWS = REGISTERS / 4;  // sums in int32 and in float32 fill half of the registers
constexpr int64_t ROW_BLOCK = 64;
// Bytes ahead, into the second cache and into the first. The hardware's own prefetching ends with each page of 4096.
constexpr int64_t PREFETCH_FAR = 8192, PREFETCH_NEAR = 1024;

// The rows of the tile that begins at `row`: TILE_ROWS as long as there are as many, then 4, 2, 1.
INLINE int64_t rows_of_tile(int64_t row, int64_t rows) {
  const int64_t left = rows - row;
  return left >= TILE_ROWS ? TILE_ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// x in int8: group by group step * quads. Rows lie tile by tile, the rows of a tile side by side for each four
// neighbours, so that a tile reads one stream. What belongs to a group is kept for each chunk, which is a group of 16
// or 32 neighbours, or 32 neighbours of a larger one.
struct RoundedRows {
  RoundedRows(int64_t rows, int64_t K, int64_t group, int32_t surplus)
      : rows(rows),
        K(K),
        group(group),
        chunk(group < 32 ? group : 32),
        chunks(K / chunk),
        surplus(surplus),
        memory(rows * (K / 4 + 3 * chunks)),
        steps(memory.data()),
        totals(steps + rows * chunks),
        starts(reinterpret_cast<int32_t*>(totals + rows * chunks)),
        quads(reinterpret_cast<int8_t*>(starts + rows * chunks)) {}

  int64_t rows, K, group, chunk, chunks;
  int32_t surplus;  // of the weights that they meet
  Scratch memory;
  // Tile by tile: (chunks, rows of the tile), and quads (K / 4, rows of the tile, 4).
  float* steps;
  float* totals;    // step * (sum of the quads)
  int32_t* starts;  // -surplus * (sum of the quads), where a sum of products starts
  int8_t* quads;
};

// Below this magnitude, 2^-100, a group counts as zeros: 127 over it must be finite.
constexpr float SMALLEST = 7.88860905e-31f;

struct Rounding {
  float step, inverse;
};

// Of a group of x. A NaN or inf makes the step NaN.
template <class T>
INLINE Rounding rounding_of(const T* x, int64_t group) {
  ivec largest{};  // as integers magnitudes have the same order, with inf and NaN at its end
  for (int64_t i = 0; i < group; i += LANES) {
    const ivec magnitude = bits_of<ivec>(load(x + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float peak = bits_of<float>(max_lanes(largest));
  if (!(peak <= FLT_MAX)) return {NAN, 0.0f};
  if (peak < SMALLEST) return {0.0f, 0.0f};
  return {peak * (1.0f / 127.0f), 127.0f / peak};
}

// The integers of LANES values, stored four at a time `stride` bytes apart.
INLINE void store_quads(int8_t* to, int64_t stride, ivec integers) {
  const auto narrow = __builtin_convertvector(integers, vector_of<int8_t, LANES>::type);
  for (int i = 0; i < LANES; i += 4) {
    std::memcpy(to + i / 4 * stride, reinterpret_cast<const char*>(&narrow) + i, 4);
  }
}

// The values [begin, end) of row number r of the tile that begins at `first`; x is the whole row.
template <class T>
void round_row(const T* x, const RoundedRows& to, int64_t first, int64_t r, int64_t begin, int64_t end) {
  const int64_t rows = rows_of_tile(first, to.rows), group = to.group, chunk = to.chunk;
  int8_t* quads = to.quads + first * to.K + 4 * r;
  const int64_t place = first * to.chunks + begin / chunk * rows + r;
  float *steps = to.steps + place, *totals = to.totals + place;
  int32_t* starts = to.starts + place;
  const int32_t surplus = to.surplus;
  for (; begin < end; begin += group) {
    const Rounding rounding = rounding_of(x + begin, group);
    for (int64_t k = begin; k < begin + group; k += chunk) {
      ivec sums{};
      for (int64_t i = k; i < k + chunk; i += LANES) {
        const vec scaled = round(load(x + i) * rounding.inverse);
        const ivec integers = __builtin_convertvector(scaled == scaled ? scaled : vec{}, ivec);
        store_quads(quads + i * rows, 4 * rows, integers);
        sums += integers;
      }
      const int32_t sum = sum_lanes(sums);
      *steps = rounding.step;
      *totals = rounding.step * float(sum);
      *starts = -surplus * sum;
      steps += rows, totals += rows, starts += rows;
    }
  }
}

// Threads take pieces of a tile's rows and 1024 neighbours: the rows of a tile share their cache lines.
template <class T>
void round_rows(const T* x, const RoundedRows& to) {
  constexpr int64_t PIECE = 1024;
  const int64_t pieces = (to.K + PIECE - 1) / PIECE, blocks = (to.rows + TILE_ROWS - 1) / TILE_ROWS;
  parallel_for(blocks * pieces, 2, [&](int64_t piece, int64_t end_piece) {
    for (; piece < end_piece; ++piece) {
      const int64_t k = piece % pieces * PIECE, k_end = to.K - k < PIECE ? to.K : k + PIECE;
      int64_t row = piece / pieces * TILE_ROWS;
      const int64_t end = to.rows - row < TILE_ROWS ? to.rows : row + TILE_ROWS;
      for (int64_t first = row; row < end; first = row) {
        for (const int64_t tile_end = first + rows_of_tile(first, to.rows); row < tile_end; ++row) {
          round_row(x + row * to.K, to, first, row - first, k, k_end);
        }
      }
    }
  });
}

// How a block of 64 bytes holds weights.
struct Int8Weights {
  using Quads = Int8Quads;
  static constexpr int QUADS_IN_BLOCK = 1;
  static constexpr int32_t SURPLUS = Quads::SURPLUS;
  static constexpr bool HAS_MINIMUM = false;
  INLINE static Quads quads(bytes block, int) { return Quads(block); }
};
template <bool MINIMUM>
struct Int4Weights {
  using Quads = Int4Quads;
  static constexpr int QUADS_IN_BLOCK = 2;
  static constexpr int32_t SURPLUS = MINIMUM ? 0 : 8;
  static constexpr bool HAS_MINIMUM = MINIMUM;
  INLINE static Quads quads(bytes block, int half) {
    using words = vector_of<uint16_t, 2 * LANES>::type;
    const words w = bits_of<words>(block);
    return Quads(bits_of<bytes>((half == 0 ? w : w >> 4) & 0x0f0f));
  }
};

struct Panel {
  const uint8_t* values;
  const float16* scales;
  const float16* minimums;
  int chunks_in_group_log2;
};

// y[r][n] of R rows and V vectors of outputs, the first at `vector` in the panel; y's rows are PANEL apart.
template <class Weights, int R, int V>
[[gnu::noinline]] void tile(const RoundedRows& x, int64_t row, const Panel& panel, int vector, float* y) {
  using Quads = typename Weights::Quads;
  vec result[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) result[r][v] = vec{};
  const uint8_t* values = panel.values + vector * LANES * 4;
  const int8_t* quads = x.quads + row * x.K;
  int64_t at = row * x.chunks;
  for (int64_t c = 0; c < x.chunks; ++c, at += R) {
    typename Quads::Sum sums[R][V] = {};
    for (int64_t k = 0; k < x.chunk; k += 16) {
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad, quads += 4 * R) {
        Quads weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          weights[v] = Weights::quads(load_bytes(values + v * LANES * 4), quad % Weights::QUADS_IN_BLOCK);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const bytes activations = broadcast_quad(quads + 4 * r);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[r][v] = weights[v].add_to(sums[r][v], activations);
        }
        if ((quad + 1) % Weights::QUADS_IN_BLOCK == 0) {
          __builtin_prefetch(values + PREFETCH_FAR, 0, 2);
          __builtin_prefetch(values + PREFETCH_NEAR);
          values += BLOCK;
        }
      }
    }
    const int64_t scale_at = (c >> panel.chunks_in_group_log2) * PANEL + vector * LANES;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vec scale = load(panel.scales + scale_at + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        ivec sum = Quads::total(sums[r][v]);
        if constexpr (Weights::SURPLUS != 0) sum += broadcast_int(x.starts[at + r]);
        result[r][v] = fma(__builtin_convertvector(sum, vec) * x.steps[at + r], scale, result[r][v]);
        if constexpr (Weights::HAS_MINIMUM) {
          const vec minimum = load(panel.minimums + scale_at + v * LANES);
          result[r][v] = fma(broadcast(x.totals[at + r]), minimum, result[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(y + r * PANEL + (vector + v) * LANES, result[r][v]);
}

// R rows of a whole panel.
template <class Weights, int R>
INLINE void panel_tile(const RoundedRows& x, int64_t row, const Panel& panel, float* y) {
  constexpr int V = TILE_ROWS / R < PANEL_VECS ? TILE_ROWS / R : PANEL_VECS;
  for (int vector = 0; vector < PANEL_VECS; vector += V) tile<Weights, R, V>(x, row, panel, vector, y);
}

// The tile that begins at `row`, of a whole panel. 3 kinds of weights x 4 numbers of rows = 12 builds.
template <class Weights>
INLINE void any_tile(const RoundedRows& x, int64_t row, const Panel& panel, float* y) {
  const int64_t rows = rows_of_tile(row, x.rows);
  if (rows == TILE_ROWS) return panel_tile<Weights, TILE_ROWS>(x, row, panel, y);
  if constexpr (TILE_ROWS > 4) {
    if (rows == 4) return panel_tile<Weights, 4>(x, row, panel, y);
  }
  if (rows == 2) return panel_tile<Weights, 2>(x, row, panel, y);
  return panel_tile<Weights, 1>(x, row, panel, y);
}

INLINE Panel panel_of(const LinearQuantizedForward& a, int64_t p) {
  if (a.K == 0) return {};
  const int64_t values = p * PANEL * a.K / (a.format == QuantizedFormat::int4 ? 2 : 1);
  const int64_t scales = p * PANEL * (a.K / a.group);
  const auto* minimums = static_cast<const float16*>(a.minimums);
  return {a.values + values, static_cast<const float16*>(a.scales) + scales,
          minimums == nullptr ? nullptr : minimums + scales, a.group <= 32 ? 0 : __builtin_ctzll(a.group / 32)};
}

// Rows [row, end) of the outputs of panel p.
template <class T, class Weights>
void multiply_panel(const LinearQuantizedForward& a, const RoundedRows& x, const Bias& bias, int64_t p, int64_t row,
                    int64_t end) {
  const Panel panel = panel_of(a, p);
  const int64_t n = p * PANEL, outputs = a.N - n < PANEL ? a.N - n : PANEL;
  alignas(64) float sums[TILE_ROWS * PANEL];
  while (row < end) {
    any_tile<Weights>(x, row, panel, sums);
    const int64_t tile_end = row + rows_of_tile(row, a.M);
    for (const float* from = sums; row < tile_end; ++row, from += PANEL) {
      bias.add_to(from, n, outputs, static_cast<T*>(a.y) + row * a.N + n);
    }
  }
}

template <class T, class Weights>
bool forward(const LinearQuantizedForward& a) {
  const Bias bias(a.bias, a.bias_dtype, a.N);
  const RoundedRows x(a.M, a.K, a.group, Weights::SURPLUS);
  if (!bias.ok() || !x.memory.ok()) return false;
  round_rows(static_cast<const T*>(a.x), x);

  const int64_t panels = (a.N + PANEL - 1) / PANEL, row_blocks = (a.M + ROW_BLOCK - 1) / ROW_BLOCK;
  // A task is a thread's share, in one stream (each further one starts with no line fetched ahead), or 4M
  // weights of a larger share, so that the threads end together whatever else the machine does.
  const int64_t threads = runtime.threads(), share = panels / threads + (panels % threads != 0 || panels == 0);
  const int64_t most = (int64_t{4} << 20) / (PANEL * (a.K + 1)) + 1;
  const int64_t in_task = share < most ? share : most, tasks = (panels + in_task - 1) / in_task;
  const auto work = [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t row = task / tasks * ROW_BLOCK, row_end = a.M - row < ROW_BLOCK ? a.M : row + ROW_BLOCK;
      const int64_t first = task % tasks * in_task, end = panels - first < in_task ? panels : first + in_task;
      for (int64_t p = first; p < end; ++p) {
        multiply_panel<T, Weights>(a, x, bias, p, row, row_end);
      }
    }
  };
  // A second thread pays from about 64k weights.
  parallel_tasks(row_blocks * tasks, work, (a.M + 7) / 8 * a.N * a.K < 65536);
  return true;
}

template <class T>
bool forward(const LinearQuantizedForward& a) {
  if (a.format == QuantizedFormat::int8) return forward<T, Int8Weights>(a);
  if (a.minimums == nullptr) return forward<T, Int4Weights<false>>(a);
  return forward<T, Int4Weights<true>>(a);
}

}  // namespace

bool linear_quantized_forward(const LinearQuantizedForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
