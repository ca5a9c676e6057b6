// Attention's blocks: which keys each query may see, where they lie, and K and V of one block of keys as tiles.
//
// Products are made of words: a float32, or two bfloat16 side by side along the summed axis where the CPU multiplies
// pairs of those.
#pragma once

#include <type_traits>

#include "attention_tile.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Keys are taken in blocks, counted from key 0 of a sequence, so that the order of every sum over keys is a matter of
// the sequence alone. Partial softmaxes restart at every chunk and are merged in order: chunks can go to different
// threads.
constexpr int64_t KEY_BLOCK = 256;
constexpr int64_t KEY_CHUNK = 2 * KEY_BLOCK;
constexpr int64_t AHEAD = 2 * LANES;  // keys that are fetched early
constexpr int64_t QUERY_BLOCK = 8 * TILE_ROWS;
constexpr int64_t PANEL = TILE_VECS * LANES;  // keys side by side in packed K
static_assert(KEY_BLOCK % PANEL == 0);

// Scores are kept in units of log 2, so that exp is 2^x.
constexpr double LOG2E_EXACT = 1.4426950408889634;
constexpr float LOG2E = float(LOG2E_EXACT);

template <class T>
constexpr int64_t WORD = ProductsOf<T>::VALUES;  // elements in a word
template <class T>
constexpr bool IN_PAIRS = WORD<T> == 2;
// Integers, each row of which has a scale. Scores and weights are multiplied by it, and the rows stay as they are.
template <class T>
constexpr bool HAS_SCALES = std::is_same_v<T, int8_t>;

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t padded(int64_t width) { return round_up(width, LANES); }
template <class T>
INLINE int64_t words(int64_t elements) {
  return (elements + WORD<T> - 1) / WORD<T>;
}

// What q.k is multiplied by; with a soft-cap it is the cap's argument that comes out. Float32 queries are multiplied
// before the product, for free; pairs stay as they are, for they would be rounded, and their scores are multiplied.
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

template <class T>
INLINE T* row_at(T* base, const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t position) {
  return base + batch * strides[0] + head * strides[1] + position * strides[2];
}

// One sequence: its queries and keys, where they lie in the tensors and where its queries stand.
struct Sequence {
  Sequence(const AttentionProblem& p, int64_t index)
      : problem(p), index(index), batch(index), queries(p.T), keys(p.S), first_query(0), first_key(0) {
    if (p.q_ends != nullptr) {
      batch = 0;
      first_query = p.q_ends[index], queries = p.q_ends[index + 1] - first_query;
      first_key = p.k_ends[index], keys = p.k_ends[index + 1] - first_key;
    }
    if (p.kv_lengths != nullptr) {
      const int64_t length = p.kv_lengths[index];
      keys = length < 0 ? 0 : (length > p.S ? p.S : length);
    }
    offset = p.q_offset == NO_OFFSET ? keys - queries : p.q_offset;
    if (p.q_offsets != nullptr) offset = p.q_offsets[index];
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

  // The row of query t of head h in a tensor of queries, and its place in lse.
  template <class T>
  T* query_row(T* base, const int64_t (&strides)[3], int64_t h, int64_t t) const {
    return row_at(base, strides, batch, h, first_query + t);
  }
  int64_t statistic(int64_t h, int64_t t) const { return (batch * problem.H + h) * problem.T + first_query + t; }

  // The row of key j of head g in k or v, or in a tensor laid out as they are.
  template <class T>
  T* key_row(T* base, const int64_t (&strides)[3], int64_t g, int64_t j) const {
    if (problem.page_table == nullptr) return row_at(base, strides, batch, g, first_key + j);
    const int64_t page = problem.page_table[index * problem.page_columns + j / problem.page_length];
    return row_at(base, strides, page, g, j % problem.page_length);
  }

  // body(key, count) for each run of keys one stride apart.
  template <class F>
  void for_key_runs(KeyRange range, const F& body) const {
    for (int64_t key = range.begin, run; key < range.end; key += run) {
      run = problem.page_table == nullptr ? range.end : problem.page_length - key % problem.page_length;
      if (run > range.end - key) run = range.end - key;
      body(key, run);
    }
  }

  static constexpr int64_t FAR = int64_t{1} << 60;
  const AttentionProblem& problem;
  int64_t index, batch, queries, keys, first_query, first_key, offset;
};

// The scales of the rows of a block of keys.
template <class T>
struct BlockScales {
  static constexpr int64_t FLOATS = 0;
  void set(const Sequence&, int64_t, KeyRange) {}
  bool finite(int64_t) const { return true; }
  float of_value(int64_t) const { return 1.0f; }
};
template <>
struct BlockScales<int8_t> {
  static constexpr int64_t FLOATS = 2 * KEY_BLOCK;
  void set(const Sequence& s, int64_t g, KeyRange block) {
    const AttentionProblem& p = s.problem;
    const int64_t count = block.end - block.begin;
    s.for_key_runs(block, [&](int64_t key, int64_t run) {
      const float* k = s.key_row(p.k_scale, p.k_scale_strides, g, key);
      const float* v = s.key_row(p.v_scale, p.v_scale_strides, g, key);
      for (int64_t i = 0, j = key - block.begin; i < run; ++i, ++j) {
        keys[j] = k[i * p.k_scale_strides[2]], values[j] = v[i * p.v_scale_strides[2]];
      }
    });
    for (int64_t j = count; j < round_up(count, LANES); ++j) keys[j] = values[j] = 0.0f;
  }
  bool finite(int64_t count) const {
    return sum_over_row(count, [](vec v) { return v - v; }, values) == 0.0f;
  }
  float of_value(int64_t j) const { return values[j]; }
  float keys[KEY_BLOCK], values[KEY_BLOCK];
};

// Where the rows of a block of keys lie in K and V, and of some behind it, to be fetched early. At a sequence's end the
// last key's stand in for more: whatever they hold, no query sees it.
template <class T>
struct BlockRows {
  BlockRows(const Sequence& s, int64_t g, KeyRange block) : count(block.end - block.begin) {
    const AttentionProblem& p = s.problem;
    const int64_t located = intersect({block.begin, block.end + AHEAD}, {0, s.keys}).end - block.begin;
    s.for_key_runs({block.begin, block.begin + located}, [&](int64_t key, int64_t run) {
      const int64_t j = key - block.begin;
      const T* k = s.key_row(static_cast<const T*>(p.k), p.k_strides, g, key);
      const T* v = s.key_row(static_cast<const T*>(p.v), p.v_strides, g, key);
      for (int64_t i = 0; i < run; ++i) keys[j + i] = k + i * p.k_strides[2];
      for (int64_t i = 0; i < run; ++i) values[j + i] = v + i * p.v_strides[2];
    });
    for (int64_t j = located; j < round_up(count, PANEL) + AHEAD; ++j) {
      keys[j] = keys[located - 1], values[j] = values[located - 1];
    }
    scales.set(s, g, block);
  }
  int64_t count;
  BlockScales<T> scales;
  const T* keys[KEY_BLOCK + AHEAD];
  const T* values[KEY_BLOCK + AHEAD];
};

INLINE vec finite_or_zero(vec v) { return v - v == vec{} ? v : vec{}; }

// Values that two bfloat16 hold exactly, as words.
INLINE vec pair_words(vec even, vec odd) {
  return bits_of<vec>(bits_of<uvec>(even) >> 16 | (bits_of<uvec>(odd) & 0xffff0000u));
}

// LANES words from `from` on.
template <class T>
INLINE vec load_words(const T* from) {
  if constexpr (IN_PAIRS<T>) return load(reinterpret_cast<const float*>(from));
  return load(from);
}
// The same where only `left` elements are left, zeros behind them.
template <class T>
INLINE vec load_words(const T* from, int64_t left) {
  if (left >= LANES * WORD<T>) return load_words(from);
  if constexpr (!IN_PAIRS<T>) return load_partial(from, left);
  vec v = {};
  std::memcpy(&v, from, size_t(left) * sizeof(T));
  return v;
}

// Fetches the rows of `width` from `rows` on in memory's order, STEP elements at a time: for loads that take as much of
// each row in turn, which no hardware foresees.
template <int64_t STEP, class T>
struct EarlyFetch {
  const T* const* rows;
  int64_t width, at = 0;
  INLINE void next() {
    __builtin_prefetch(*rows + at);
    at += STEP;
    if (at >= width) at = 0, ++rows;
  }
};

// Elements narrower than a word, in 32 bits as they lie in memory: those of LANES keys change places as one, and are
// taken apart afterwards.
template <class T>
constexpr int PARTS = 1;
template <>
constexpr int PARTS<lone_bfloat16> = 2;
template <>
constexpr int PARTS<int8_t> = 4;

template <class T>
INLINE vec load_parts(const T* from) {
  if constexpr (PARTS<T> > 1) return load(reinterpret_cast<const float*>(from));
  return load_words(from);
}
template <int PART, class T>
INLINE vec part_of(vec parts, T) {
  const uvec above = bits_of<uvec>(parts) << (32 - (PART + 1) * (32 / PARTS<T>));
  if constexpr (PARTS<T> == 1) {
    return parts;
  } else if constexpr (PARTS<T> == 2) {
    return bits_of<vec>(above & 0xffff0000u);
  } else {
    return __builtin_convertvector(bits_of<ivec>(above) >> 24, vec);
  }
}

// packed[panel][word][PANEL] = K^T of `count` keys, whole panels. `width` elements of each key.
template <class T>
void pack_keys(const T* const* keys, int64_t count, int64_t width, float* packed) {
  const int64_t row_words = words<T>(width);
  for (int64_t j = 0; j < round_up(count, PANEL); j += LANES) {
    float* panel = packed + j / PANEL * PANEL * row_words + j % PANEL;
    EarlyFetch<LANES * WORD<T>, T> later{keys + j + AHEAD, width};
    for (int64_t w = 0; w < row_words; w += LANES) {
      const int64_t n = row_words - w < LANES ? row_words - w : LANES;
      vec tile[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        tile[i] = load_words(keys[j + i] + w * WORD<T>, width - w * WORD<T>);
        later.next();
      }
      transpose(tile);
      for (int64_t i = 0; i < n; ++i) store(panel + (w + i) * PANEL, tile[i]);
    }
  }
}

// packed[j][padded(width)] = f of `count` rows, words along j.
template <class T, class F>
INLINE void pack_rows(const T* const* rows, int64_t count, int64_t width, const F& f, float* packed) {
  for (int64_t j = 0; j < count; j += WORD<T>, packed += padded(width)) {
    for (int64_t d = 0; d < width; d += LANES) {
      const auto part = [&](const T* row) __attribute__((always_inline)) {
        return f(width - d < LANES ? load_partial(row + d, width - d) : load(row + d));
      };
      if constexpr (IN_PAIRS<T>) {
        store(packed + d, pair_words(part(rows[j]), j + 1 < count ? part(rows[j + 1]) : vec{}));
      } else {
        store(packed + d, part(rows[j]));
      }
    }
  }
}

// The same of values, zeros in place of what is not finite. True when all is.
template <class T>
bool pack_values(const T* const* values, int64_t count, int64_t width, float* packed) {
  vec nonfinite = {};  // x - x is NaN for inf and NaN, else 0
  const auto finite = [&](vec v) __attribute__((always_inline)) {
    nonfinite += v - v;
    return finite_or_zero(v);
  };
  pack_rows(values, count, width, finite, packed);
  return sum_lanes(nonfinite) == 0.0f;
}

// A row of queries as words, zeros behind it; float32 ones are multiplied by `scale`. True when all are finite.
template <class T>
bool copy_words(const T* from, int64_t width, float scale, float* to) {
  vec nonfinite = {};
  for (int64_t w = 0; w < words<T>(width); w += LANES) {
    vec v = load_words(from + w * WORD<T>, width - w * WORD<T>);
    if constexpr (IN_PAIRS<T>) {
      const vec even = bits_of<vec>(bits_of<uvec>(v) << 16), odd = bits_of<vec>(bits_of<uvec>(v) & 0xffff0000u);
      nonfinite += (even - even) + (odd - odd);
    } else {
      v *= scale;
      nonfinite += v - v;
    }
    store(to + w, v);
  }
  return sum_lanes(nonfinite) == 0.0f;
}

// A row's columns [begin, end) as bfloat16, words from begin / 2 on.
INLINE void round_weights(float* row, int64_t begin, int64_t end) {
  bfloat16* rounded = reinterpret_cast<bfloat16*>(row);
  for (int64_t j = begin; j < end; j += LANES) store_weights(rounded + j, load(row + j));
}

// scores[r][KEY_BLOCK] = Q K^T in the columns [begin, end), whole vectors, for a tile of rows of Q as words (count,
// padded(row_words)) and a block of keys in packed form.
template <class Products>
INLINE void multiply_packed(const float* rows, int64_t count, const float* packed, int64_t row_words, int64_t begin,
                            int64_t end, float* scores) {
  for (int64_t j = begin; j < end;) {
    const int64_t panel_end = j / PANEL * PANEL + PANEL, stop = end < panel_end ? end : panel_end;
    const MatrixRows keys{packed + j / PANEL * PANEL * row_words + j % PANEL, PANEL};
    any_tile<Products>(int(count), int((stop - j) / LANES), {rows, padded(row_words), 1}, keys, scores + j, KEY_BLOCK,
                       row_words, false);
    j = stop;
  }
}

// sums[r] += the products of a word of each of R rows of Q with that word of LANES keys.
template <class T, int R>
INLINE void add_products(vec (&sums)[R], const float* rows, int64_t row_words, vec keys) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = ProductsOf<T>::add(sums[r], broadcast(rows[r * row_words]), keys);
}
template <class T, int R, int... PART>
INLINE void add_parts(vec (&sums)[R], const float* rows, int64_t row_words, vec parts,
                      std::integer_sequence<int, PART...>) {
  (add_products<T>(sums, rows + PART, row_words, part_of<PART>(parts, T{})), ...);
}

template <class T>
constexpr int64_t VECTOR_WORDS = LANES * PARTS<T>;  // that a vector of a row's memory holds

// The same from K as it lies in memory, for R rows and a width of whole vectors of memory: LANES keys are transposed in
// registers and used once, and V is fetched for the product to come. The sums' order is that of the tiles.
template <int R, class T>
[[gnu::noinline]] void multiply_rows(const float* rows, const BlockRows<T>& block, int64_t row_words,
                                     int64_t value_words, int64_t begin, int64_t end, float* scores) {
  constexpr int64_t STEP = VECTOR_WORDS<T> * WORD<T>;
  for (int64_t j = begin; j < end; j += LANES) {
    vec total[R] = {}, sum[R] = {};
    EarlyFetch<STEP, T> later{block.keys + j + AHEAD, row_words * WORD<T>};
    EarlyFetch<STEP, T> values{block.values + j, value_words * WORD<T>};
    for (int64_t w = 0; w < row_words; w += VECTOR_WORDS<T>) {
      vec tile[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        tile[i] = load_parts(block.keys[j + i] + w * WORD<T>);
        later.next();
        values.next();
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        add_parts<T>(sum, rows + w + i * PARTS<T>, row_words, tile[i], std::make_integer_sequence<int, PARTS<T>>());
      }
      if ((w + VECTOR_WORDS<T>) % CHAIN != 0) continue;
      for (int r = 0; r < R; ++r) total[r] += sum[r], sum[r] = vec{};
    }
    for (int r = 0; r < R; ++r) store(scores + r * KEY_BLOCK + j, total[r] + sum[r]);
  }
}
static_assert(CHAIN == INT64_MAX || CHAIN % (4 * LANES) == 0);

// Bfloat16 columns are taken from memory two vectors at once, which is cheapest by even and odd ones.
template <class T>
constexpr int64_t COLUMN_VECTORS = std::is_base_of_v<bfloat16, T> ? 2 : 1;

// V as it lies in memory, for a width of whole COLUMN_VECTORS; its columns are those of split_columns.
template <class T>
struct ValueRows {
  // Joining pairs takes registers.
  static constexpr int64_t WIDTH = MatrixRows::WIDTH / (IN_PAIRS<T> ? 2 : 1);
  const T* const* rows;
  int64_t column;
  INLINE vec at(int64_t k, int64_t d) const {
    if constexpr (COLUMN_VECTORS<T> == 1) return load(rows[k] + column + d);
    const bool odd = d / LANES % 2 != 0;
    const int64_t first = column + d - (odd ? LANES : 0);
    const auto bits = [&](int64_t row) __attribute__((always_inline)) {
      return bits_of<uvec>(load(reinterpret_cast<const float*>(rows[row] + first)));
    };
    if constexpr (IN_PAIRS<T>) {
      const uvec a = bits(2 * k), b = bits(2 * k + 1);
      return bits_of<vec>(odd ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16);
    } else {
      return bits_of<vec>(odd ? bits(k) & 0xffff0000u : bits(k) << 16);
    }
  }
  INLINE ValueRows from(int64_t k, int64_t d) const { return {rows + k * WORD<T>, column + d}; }
};

// Rows of values with their columns as ValueRows has them, and back.
template <class T>
void split_columns(const float* rows, int64_t size, float* split) {
  if constexpr (COLUMN_VECTORS<T> == 1) {
    std::memcpy(split, rows, size_t(size) * sizeof(float));
  } else {
    for (int64_t i = 0; i < size; i += 2 * LANES) {
      vec even, odd;
      split_pairs(load(rows + i), load(rows + i + LANES), even, odd);
      store(split + i, even, odd);
    }
  }
}
template <class T>
void join_columns(const float* split, int64_t size, float* rows) {
  if constexpr (COLUMN_VECTORS<T> == 1) {
    std::memcpy(rows, split, size_t(size) * sizeof(float));
  } else {
    for (int64_t i = 0; i < size; i += 2 * LANES) {
      vec a, b;
      join_pairs(load(split + i), load(split + i + LANES), a, b);
      store(rows + i, a, b);
    }
  }
}

// C (rows, width) += A (rows, depth) B (depth, width), C with rows of `width`, a multiple of LANES; depth in words.
template <class Products, class B>
INLINE void accumulate_product(int64_t rows, StridedMatrix a, B b, float* c, int64_t width, int64_t depth) {
  if (depth <= 0) return;
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const StridedMatrix part{a.data + r * a.row, a.row, a.column};
    const int count = int(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
    for (int64_t d = 0; d < width; d += B::WIDTH) {
      const int vecs = int((width - d < B::WIDTH ? width - d : B::WIDTH) / LANES);
      any_tile<Products>(count, vecs, part, b.from(0, d), c + r * width + d, width, depth, true);
    }
  }
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
