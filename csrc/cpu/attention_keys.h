// Attention's blocks: which keys each query may see, and K and V of one block of keys as float32 tiles.
#pragma once

#include "gemm_tile.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Keys are taken in blocks, counted from key 0 of a sequence, so that the order of every sum over keys is a matter of
// the sequence alone. Partial softmaxes restart at every chunk and are merged in order: chunks can go to different
// threads.
constexpr int64_t KEY_BLOCK = 256;
constexpr int64_t KEY_CHUNK = 2 * KEY_BLOCK;
constexpr int64_t QUERY_BLOCK = 8 * TILE_ROWS;
constexpr int64_t PANEL = TILE_VECS * LANES;  // keys side by side in packed K
static_assert(KEY_BLOCK % PANEL == 0);

// Scores are kept in units of log 2, so that exp is 2^x: the factor goes into the queries, for free.
constexpr double LOG2E_EXACT = 1.4426950408889634;
constexpr float LOG2E = float(LOG2E_EXACT);

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t padded(int64_t width) { return round_up(width, LANES); }

// What queries are multiplied by before the product; with a soft-cap it is the cap's argument that comes out.
INLINE float query_scale(const AttentionProblem& p) {
  return p.softcap == 0.0f ? p.scale * LOG2E : p.scale / p.softcap;
}

struct KeyRange {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
INLINE KeyRange intersect(KeyRange a, KeyRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}
INLINE KeyRange hull(KeyRange a, KeyRange b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

// One sequence of the batch: its number of keys and where its queries stand.
struct Sequence {
  Sequence(const AttentionProblem& p, int64_t batch) : problem(p), batch(batch), keys(p.S) {
    if (p.kv_lengths != nullptr) {
      const int64_t length = p.kv_lengths[batch];
      keys = length < 0 ? 0 : (length > p.S ? p.S : length);
    }
    offset = p.q_offset == NO_OFFSET ? keys - p.T : p.q_offset;
    if (p.q_offsets != nullptr) offset = p.q_offsets[batch];
    // Far beyond any position, and no sum of positions and windows can overflow.
    offset = offset < -FAR ? -FAR : (offset > FAR ? FAR : offset);
  }

  // The keys that query t may see, by its position alone.
  KeyRange range(int64_t t) const {
    const int64_t position = offset + t;
    KeyRange seen{0, keys};
    if (problem.causal) seen = intersect(seen, {0, position + 1});
    const auto bounded = [](int64_t window) { return window > FAR ? FAR : window; };
    if (problem.window_left >= 0) seen = intersect(seen, {position - bounded(problem.window_left), keys});
    if (problem.window_right >= 0) seen = intersect(seen, {0, position + bounded(problem.window_right) + 1});
    return seen.empty() ? KeyRange{0, 0} : seen;
  }

  static constexpr int64_t FAR = int64_t{1} << 60;
  const AttentionProblem& problem;
  int64_t batch, keys, offset;
};

// packed[panel][d][PANEL] = K^T of `count` keys, zeros behind them up to whole panels. `width` of each key's values.
template <class T>
void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t width, float* packed) {
  for (int64_t j = 0; j < round_up(count, PANEL); j += LANES) {
    float* panel = packed + j / PANEL * PANEL * width + j % PANEL;
    for (int64_t d = 0; d < width; d += LANES) {
      const int64_t n = width - d < LANES ? width - d : LANES;
      vec tile[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const T* row = keys + (j + i) * stride + d;
        tile[i] = j + i >= count ? vec{} : (n == LANES ? load(row) : load_partial(row, n));
      }
      transpose(tile);
      for (int64_t i = 0; i < n; ++i) store(panel + (d + i) * PANEL, tile[i]);
    }
  }
}

template <class T>
INLINE T* row_at(T* base, const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t position) {
  return base + batch * strides[0] + head * strides[1] + position * strides[2];
}

// rows[j][padded(width)] = `count` rows as float32, times `scale`, zeros behind each. True when all are finite.
template <class T>
bool copy_rows(const T* from, int64_t stride, int64_t count, int64_t width, float scale, float* rows) {
  const int64_t row = padded(width);
  vec nonfinite = {};  // x - x is NaN for inf and NaN, else 0
  for (int64_t j = 0; j < count; ++j, from += stride, rows += row) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
      const vec v = load(from + d) * scale;
      nonfinite += v - v;
      store(rows + d, v);
    }
    if (d < width) {
      const vec v = load_partial(from + d, width - d) * scale;
      nonfinite += v - v;
      store(rows + d, v);
    }
  }
  return sum_lanes(nonfinite) == 0.0f;
}

// scores[r][KEY_BLOCK] = A B^T in the columns [begin, end), whole vectors, for a tile of rows of A (count,
// padded(width)) and a block of keys in packed form.
INLINE void multiply_packed(const float* rows, int64_t count, const float* packed, int64_t width, int64_t begin,
                            int64_t end, float* scores) {
  for (int64_t j = begin; j < end;) {
    const int64_t panel_end = j / PANEL * PANEL + PANEL, stop = end < panel_end ? end : panel_end;
    any_tile(int(count), int((stop - j) / LANES), {rows, padded(width), 1},
             packed + j / PANEL * PANEL * width + j % PANEL, PANEL, scores + j, KEY_BLOCK, width, false);
    j = stop;
  }
}

// C (rows, width) += A (rows, depth) B (depth, width), C and B with rows of `width`, a multiple of LANES.
INLINE void accumulate_product(int64_t rows, StridedMatrix a, const float* b, float* c, int64_t width, int64_t depth) {
  if (depth <= 0) return;
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const StridedMatrix part{a.data + r * a.row, a.row, a.column};
    const int count = int(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
    for (int64_t d = 0; d < width; d += PANEL) {
      const int vecs = int((width - d < PANEL ? width - d : PANEL) / LANES);
      any_tile(count, vecs, part, b + d, width, c + r * width + d, width, depth, true);
    }
  }
}

// K and V of one block of keys, ready for the tiles.
struct KeyBlock {
  const float* packed_keys;  // see pack_keys
  const float* values;       // (KEY_BLOCK, padded(Dv))
  bool finite;               // all values are
};

INLINE int64_t packed_keys_size(const AttentionProblem& p) { return KEY_BLOCK * p.D; }
INLINE int64_t values_size(const AttentionProblem& p) { return KEY_BLOCK * padded(p.Dv); }

template <class T>
KeyBlock pack_block(const AttentionProblem& p, int64_t b, int64_t g, KeyRange keys, float* packed, float* values) {
  const T* k = row_at(static_cast<const T*>(p.k), p.k_strides, b, g, keys.begin);
  const T* v = row_at(static_cast<const T*>(p.v), p.v_strides, b, g, keys.begin);
  const int64_t count = keys.end - keys.begin;
  pack_keys(k, p.k_strides[2], count, p.D, packed);
  return {packed, values, copy_rows(v, p.v_strides[2], count, p.Dv, 1.0f, values)};
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
