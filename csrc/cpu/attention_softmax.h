// Attention's softmax in progress: the state of a block of query rows, and how a tile of them takes in one block of
// keys.
#pragma once

#include "attention_dropout.h"
#include "attention_scores.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Of each row: highest score so far (times LOG2E), sum of exponentials, weighted sum of values.
struct Partial {
  float* highest;  // (rows)
  float* sum;      // (rows)
  float* values;   // (rows, padded(Dv))

  Partial(float* memory, int64_t rows) : highest(memory), sum(memory + rows), values(memory + 2 * rows) {}
  static int64_t size(const AttentionProblem& p, int64_t rows) { return round_up(rows * (2 + padded(p.Dv)), LANES); }

  void clear(int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
      highest[r] = -INFINITY;
      sum[r] = 0.0f;
    }
    std::memset(values, 0, size_t(rows * width) * sizeof(float));
  }
};

INLINE float exp2_one(float x) { return exp2(broadcast(x))[0]; }

// Takes a later chunk of keys into the state. Exact when either side is empty (a sum of NaN is not).
void merge(Partial& into, const Partial& from, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.sum[r] == 0.0f) continue;
    const float highest = into.highest[r] > from.highest[r] ? into.highest[r] : from.highest[r];
    const float old_scale = exp2_one(into.highest[r] - highest), new_scale = exp2_one(from.highest[r] - highest);
    into.highest[r] = highest;
    into.sum[r] = into.sum[r] * old_scale + from.sum[r] * new_scale;
    const auto weighted = [=](vec a, vec b) { return a * old_scale + b * new_scale; };
    map_row(into.values + r * width, width, weighted, into.values + r * width, from.values + r * width);
  }
}

// 2^(scores * scale - highest) in place over whole vectors, added to `sums` lane by lane. With pairs and `rounded` as
// bfloat16, from the middle of the scores' place in `row` on, as round_weights puts them. With scales of values times
// those; the caller looks after what is not finite.
template <class T>
INLINE void exponentiate(float* row, int64_t begin, int64_t end, float scale, float highest, bool rounded,
                         const BlockScales<T>* scales, float* sums) {
  vec sum = load(sums);
  for (int64_t j = begin; j < end; j += LANES) {
    const vec score = IN_PAIRS<T> ? load(row + j) * scale : load(row + j);
    const vec e = exp2(score - highest);
    sum += e;
    if (IN_PAIRS<T> && rounded) {
      store_weights(reinterpret_cast<bfloat16*>(row) + j, e);
    } else if constexpr (HAS_SCALES<T>) {
      store(row + j, e * finite_or_zero(load(scales->values + j)));
    } else {
      store(row + j, e);
    }
  }
  store(sums, sum);
}

// One block of keys as the tiles take it: in packed form, or the rows themselves.
template <class T>
struct KeyBlock {
  const BlockRows<T>* rows;      // null: packed
  const float* packed_keys;      // see pack_keys
  const float* values;           // see pack_values
  bool finite;                   // all values are
  const BlockScales<T>* scales;  // where there are any
};

// Room for a tile's work.
struct TileSpace {
  float* scores;  // (TILE_ROWS, KEY_BLOCK)
  float* values;  // (TILE_ROWS, padded(Dv)); with rows not packed (KEY_BLOCK, padded(Dv)) behind it
};

// Up to TILE_ROWS query rows against one block of keys, which starts at key `first`.
template <class T>
struct RowTile {
  const Sequence& sequence;
  int64_t g;
  const ScoreRow* rows;
  int64_t count;
  const float* queries;  // (count, padded(words(D)))
  float *highest, *sums, *values;
  const TileSpace& space;

  void attend(const KeyBlock<T>& block, KeyRange keys) {
    KeyRange seen{0, 0};
    for (int64_t r = 0; r < count; ++r) seen = hull(seen, intersect(rows[r].range, keys));
    if (seen.empty()) return;
    const int64_t first = keys.begin, begin = (seen.begin - first) / LANES * LANES;
    const int64_t end = round_up(seen.end - first, LANES);
    multiply_keys(block, begin, end);
    if constexpr (HAS_SCALES<T>) {
      for (int64_t r = 0; r < count; ++r) {
        float* scores = space.scores + r * KEY_BLOCK + begin;
        map_row(scores, end - begin, [](vec s, vec k) { return s * k; }, scores, block.scales->keys + begin);
      }
    }
    // One loop for each step, not one for all: the rows' chains of latencies overlap.
    float scales[TILE_ROWS], tops[TILE_ROWS];
    for (int64_t r = 0; r < count; ++r) {
      float* scores = space.scores + r * KEY_BLOCK + begin;
      const float scale = IN_PAIRS<T> ? query_scale(sequence.problem) : 1.0f;
      scales[r] = finish_scores(sequence, rows[r], first + begin, scale, scores, end - begin);
      tops[r] = max_over_row(end - begin, scores) * scales[r];
    }
    for (int64_t r = 0; r < count; ++r) raise_highest(r, tops[r]);
    const bool drops = sequence.problem.dropout_threshold != 0;
    for (int64_t r = 0; r < count; ++r) {
      float* row = space.scores + r * KEY_BLOCK;
      // With nothing seen yet every score is -inf or NaN: minus 0, they become 0 and NaN.
      const float shift = highest[r] == -INFINITY ? 0.0f : highest[r];
      exponentiate(row, begin, end, scales[r], shift, !drops, block.scales, sums + r * LANES);
      if (!drops) continue;
      drop_scores(sequence, rows[r], first + begin, row + begin, end - begin);
      if constexpr (IN_PAIRS<T>) round_weights(row, begin, end);
    }
    multiply_values(block, keys, {seen.begin - first, seen.end - first});
  }

  void multiply_keys(const KeyBlock<T>& block, int64_t begin, int64_t end) {
    const int64_t width = words<T>(sequence.problem.D);
    if (block.rows == nullptr) {
      multiply_packed<ProductsOf<T>>(queries, count, block.packed_keys, width, begin, end, space.scores);
      return;
    }
    // No fewer words of V than of K are fetched for each key: those of LANES keys, not more.
    const int64_t value_width = words<T>(sequence.problem.Dv), fetched = value_width < width ? width : value_width;
    const auto multiply = [&](auto tile_rows) {
      multiply_rows<decltype(tile_rows)::value>(queries, *block.rows, width, fetched, begin, end, space.scores);
    };
    switch (count) {
      case 6:
        return multiply(std::integral_constant<int, 6>{});
      case 5:
        return multiply(std::integral_constant<int, 5>{});
      case 4:
        return multiply(std::integral_constant<int, 4>{});
      case 3:
        return multiply(std::integral_constant<int, 3>{});
      case 2:
        return multiply(std::integral_constant<int, 2>{});
      default:
        return multiply(std::integral_constant<int, 1>{});
    }
  }

  void raise_highest(int64_t r, float top) {
    if (!(top > highest[r])) return;
    const float before = highest[r];
    highest[r] = top;
    if (before == -INFINITY) return;  // nothing to scale yet
    const int64_t width = padded(sequence.problem.Dv);
    const float scale = exp2_one(before - top);
    store(sums + r * LANES, load(sums + r * LANES) * scale);
    map_row(values + r * width, width, [=](vec v) { return v * scale; }, values + r * width);
  }

  void multiply_values(const KeyBlock<T>& block, KeyRange keys, KeyRange seen) {
    const int64_t width = padded(sequence.problem.Dv), size = count * width;
    if (block.rows == nullptr) {
      multiply_values(MatrixRows{block.values, width}, seen, values);
      if (!block.finite) add_nonfinite(BlockRows<T>(sequence, g, keys), keys.begin, seen);
      return;
    }
    split_columns<T>(values, size, space.values);
    multiply_values(ValueRows<T>{block.rows->values, 0}, seen, space.values);
    if (HAS_SCALES<T> || are_finite(space.values, size)) {
      join_columns<T>(space.values, size, values);
      if (!block.finite) add_nonfinite(*block.rows, keys.begin, seen);
      return;
    }
    // Something that was multiplied is not finite, and not every row may see it: once more without that.
    float* packed = space.values + TILE_ROWS * width;
    pack_values(block.rows->values, block.rows->count, sequence.problem.Dv, packed);
    multiply_values(MatrixRows{packed, width}, seen, values);
    add_nonfinite(*block.rows, keys.begin, seen);
  }

  template <class B>
  void multiply_values(const B& block_values, KeyRange seen, float* into) {
    const int64_t begin = seen.begin / WORD<T>;
    accumulate_product<ProductsOf<T>>(count, {space.scores + begin, KEY_BLOCK, 1}, block_values.from(begin, 0), into,
                                      padded(sequence.problem.Dv), words<T>(seen.end) - begin);
  }

  static bool are_finite(const float* x, int64_t size) {
    vec nonfinite = {};
    for (int64_t i = 0; i < size; i += LANES) nonfinite += load(x + i) - load(x + i);
    return sum_lanes(nonfinite) == 0.0f;
  }

  // NaN and inf of values: what a row may not see must not reach it, and what it sees counts even with a weight that
  // rounds to 0.
  void add_nonfinite(const BlockRows<T>& block, int64_t first, KeyRange seen) {
    const AttentionProblem& p = sequence.problem;
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      const T* value = block.values[j];
      const float scale = block.scales.of_value(j);
      if (sum_over_row(p.Dv, [=](vec v) { return v * scale - v * scale; }, value) == 0.0f) continue;
      for (int64_t r = 0; r < count; ++r) {
        if (!visible(sequence, rows[r], first + j)) continue;
        float* into = values + r * padded(p.Dv);
        const auto add = [=](vec a, vec v) {
          v *= scale;
          return v - v == vec{} ? a : a + v;
        };
        map_row(into, p.Dv, add, into, value);
      }
    }
  }
};

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
