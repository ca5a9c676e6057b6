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

// Lane i is the largest of rows[i]'s lanes.
template <int HALF = LANES / 2>
INLINE ivec max_lanes_of_each(ivec (&rows)[LANES]) {
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) {
    const vec a = bits_of<vec>(rows[i]), b = bits_of<vec>(rows[i + HALF]);
    const ivec low = bits_of<ivec>(shuffle<lower_halves<HALF>>(a, b));
    const ivec high = bits_of<ivec>(shuffle<upper_halves<HALF>>(a, b));
    rows[i] = high > low ? high : low;
  }
  if constexpr (HALF > 1) return max_lanes_of_each<HALF / 2>(rows);
  return rows[0];
}

// The largest magnitude in each lane, of a group of x. As integers magnitudes have the same order, with inf and NaN at
// its end.
template <class T>
INLINE ivec magnitudes_of(const T* x, int64_t group) {
  ivec largest{};
  for (int64_t i = 0; i < group; i += LANES) {
    const ivec magnitude = bits_of<ivec>(load(x + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

struct Rounding {
  vec step, inverse;
};

// By the peaks of as many groups. A NaN or inf makes the step NaN.
INLINE Rounding rounding_of(vec peak) {
  const auto is_small = peak < broadcast(SMALLEST);
  const auto is_finite = peak <= broadcast(FLT_MAX);
  const vec step = is_small ? vec{} : peak * (1.0f / 127.0f), inverse = is_small ? vec{} : 127.0f / peak;
  return {is_finite ? step : broadcast(NAN), is_finite ? inverse : vec{}};
}

// The integers of LANES values, stored four at a time `stride` bytes apart.
INLINE void store_quads(int8_t* to, int64_t stride, ivec integers) {
  const auto narrow = __builtin_convertvector(integers, vector_of<int8_t, LANES>::type);
  for (int i = 0; i < LANES; i += 4) {
    std::memcpy(to + i / 4 * stride, reinterpret_cast<const char*>(&narrow) + i, 4);
  }
}

// The values [begin, end) of the R rows of the tile that begins at `first`; x is its first row, whole. As many groups
// at a time as a vector has lanes, so that what is folded across lanes is folded for all of them at once.
template <int R, class T>
void round_tile(const T* x, const RoundedRows& to, int64_t first, int64_t begin, int64_t end) {
  constexpr int GROUPS = LANES / R;  // of each row
  const int64_t group = to.group, chunk = to.chunk, chunks = group / chunk;
  const vec surplus = broadcast(float(-to.surplus));
  int8_t* quads = to.quads + first * to.K + begin * R;
  int64_t place = first * to.chunks + begin / chunk * R;
  for (; begin < end; begin += GROUPS * group, quads += GROUPS * group * R, place += GROUPS * chunks * R) {
    const int count = int((end - begin) / group < GROUPS ? (end - begin) / group : GROUPS);
    ivec largest[LANES];
    for (int g = 0; g < GROUPS; ++g) {
      for (int r = 0; r < R; ++r) {
        largest[g * R + r] = g < count ? magnitudes_of(x + r * to.K + begin + g * group, group) : ivec{};
      }
    }
    const Rounding rounding = rounding_of(bits_of<vec>(max_lanes_of_each(largest)));
    alignas(64) float inverses[LANES], of_chunk[3][LANES];
    store(inverses, rounding.inverse);
    store(of_chunk[0], rounding.step);

    for (int64_t q = 0; q < chunks; ++q) {
      vec sums[LANES];
      for (int g = 0; g < GROUPS; ++g) {
        for (int r = 0; r < R; ++r) {
          ivec sum{};
          const int64_t k = g * group + q * chunk;
          for (int64_t i = k; g < count && i < k + chunk; i += LANES) {
            const vec scaled = round(load(x + r * to.K + begin + i) * inverses[g * R + r]);
            const ivec integers = __builtin_convertvector(scaled == scaled ? scaled : vec{}, ivec);
            store_quads(quads + i * R + 4 * r, 4 * R, integers);
            sum += integers;
          }
          sums[g * R + r] = __builtin_convertvector(sum, vec);
        }
      }
      const vec sum = sum_lanes_of_each(sums);  // of integers below 2^24: exact in any order
      store(of_chunk[1], rounding.step * sum);
      store(of_chunk[2], bits_of<vec>(__builtin_convertvector(surplus * sum, ivec)));
      for (int g = 0; g < count; ++g) {
        const int64_t at = place + (g * chunks + q) * R;
        std::memcpy(to.steps + at, of_chunk[0] + g * R, R * sizeof(float));
        std::memcpy(to.totals + at, of_chunk[1] + g * R, R * sizeof(float));
        std::memcpy(to.starts + at, of_chunk[2] + g * R, R * sizeof(float));
      }
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
      while (row < end) {
        const int64_t rows = rows_of_tile(row, to.rows);
        const T* from = x + row * to.K;
        if (rows == TILE_ROWS) round_tile<TILE_ROWS>(from, to, row, k, k_end);
        if (rows == 4 && TILE_ROWS > 4) round_tile<4>(from, to, row, k, k_end);
        if (rows == 2) round_tile<2>(from, to, row, k, k_end);
        if (rows == 1) round_tile<1>(from, to, row, k, k_end);
        row += rows;
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
