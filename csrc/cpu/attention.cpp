// attention, forward: blocks of query rows over threads, each against blocks of keys (Dao, FlashAttention-2, 2023),
// with both products in register tiles (gemm_tile.h).
//
// Each product does T * S * D multiply-adds a head; K and V are packed to float32 once (or block by block when one
// block of query rows is all there is: decoding), 2 * S * D elements: bound by multiply-adds for long T, by reading K
// and V for short. Work behind the causal edge or outside the window is cut at tiles of TILE_ROWS queries and LANES
// keys. Query heads that share a key/value head form one long row of queries, so that decoding reads K and V once for
// them all. Rows never mix, and keys are taken in a fixed order: a row's bits do not depend on its block, thread or
// batch.
#include "attention_dropout.h"
#include "attention_scores.h"
#include "parallel.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// The rows of one task: queries of one sequence and key/value head, counted head by head.
struct QueryBlock {
  int64_t count = 0;
  ScoreRow rows[QUERY_BLOCK];
  KeyRange keys{0, 0};
};

QueryBlock query_block(const Sequence& s, int64_t g, int64_t first) {
  const AttentionProblem& p = s.problem;
  const int64_t group = p.H / p.G, all = group * p.T;
  QueryBlock block;
  for (int64_t r = first; r < all && r < first + QUERY_BLOCK; ++r) {
    const int64_t t = r % p.T;
    const KeyRange range = s.range(t);
    block.rows[block.count++] = {g * group + r / p.T, t, range};
    block.keys = hull(block.keys, range);
  }
  return block;
}

// A softmax in progress for a block of rows: highest score so far (times LOG2E), sum of exponentials,
// weighted sum of values.
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

// What one thread works with.
struct Workspace {
  explicit Workspace(const AttentionProblem& p)
      : partial_size(Partial::size(p, QUERY_BLOCK)),
        memory(QUERY_BLOCK * padded(p.D) + TILE_ROWS * KEY_BLOCK + padded(p.Dv) + 2 * partial_size +
               packed_keys_size(p) + values_size(p)) {
    if (!memory.ok()) return;
    queries = memory.data();
    scores = queries + QUERY_BLOCK * padded(p.D);
    row_values = scores + TILE_ROWS * KEY_BLOCK;
    partials = row_values + padded(p.Dv);
    packed_keys = partials + 2 * partial_size;
    values = packed_keys + packed_keys_size(p);
  }
  int64_t partial_size;
  Scratch memory;
  float *queries, *scores, *row_values, *partials, *packed_keys, *values;
};

// 2^(scores - highest) in place over whole vectors, added to `sums` lane by lane.
INLINE void exponentiate(float* scores, int64_t count, float highest, float* sums) {
  vec sum = load(sums);
  for (int64_t j = 0; j < count; j += LANES) {
    const vec e = exp2(load(scores + j) - highest);
    sum += e;
    store(scores + j, e);
  }
  store(sums, sum);
}

// Up to TILE_ROWS query rows against one block of keys, which starts at key `first`.
struct RowTile {
  const Sequence& sequence;
  const ScoreRow* rows;
  int64_t count;
  const float* queries;  // (count, padded(D)), scaled
  float *highest, *sums, *values;
  float* scores;      // (count, KEY_BLOCK)
  float* row_values;  // (padded(Dv))

  void attend(const KeyBlock& block, int64_t first, int64_t block_keys) {
    KeyRange seen{0, 0};
    for (int64_t r = 0; r < count; ++r) seen = hull(seen, intersect(rows[r].range, {first, first + block_keys}));
    if (seen.empty()) return;
    const int64_t begin = (seen.begin - first) / LANES * LANES, end = round_up(seen.end - first, LANES);
    multiply_packed(queries, count, block.packed_keys, sequence.problem.D, begin, end, scores);
    // One loop for each step, not one for all: the rows' chains of latencies overlap.
    float tops[TILE_ROWS];
    for (int64_t r = 0; r < count; ++r) {
      finish_scores(sequence, rows[r], first + begin, scores + r * KEY_BLOCK + begin, end - begin);
      tops[r] = max_over_row(end - begin, scores + r * KEY_BLOCK + begin);
    }
    for (int64_t r = 0; r < count; ++r) raise_highest(r, tops[r]);
    for (int64_t r = 0; r < count; ++r) {
      float* row = scores + r * KEY_BLOCK + begin;
      // With nothing seen yet every score is -inf or NaN: minus 0, they become 0 and NaN.
      exponentiate(row, end - begin, highest[r] == -INFINITY ? 0.0f : highest[r], sums + r * LANES);
      drop_scores(sequence, rows[r], first + begin, row, end - begin);
    }
    multiply_values(block, first, {seen.begin - first, seen.end - first});
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

  void multiply_values(const KeyBlock& block, int64_t first, KeyRange keys) {
    const int64_t width = padded(sequence.problem.Dv), depth = keys.end - keys.begin;
    if (!block.finite) {
      for (int64_t r = 0; r < count; ++r) add_visible_values(block, first, keys, r);
      return;
    }
    accumulate_product(count, {scores + keys.begin, KEY_BLOCK, 1}, block.values + keys.begin * width, values, width,
                       depth);
  }

  // One row and one key at a time, for values that hold NaN or inf: what the row may not see must not reach it, and
  // what it sees counts even with a weight that rounds to 0. The sums are cut as accumulate_product cuts them: the same
  // bits.
  void add_visible_values(const KeyBlock& block, int64_t first, KeyRange keys, int64_t r) {
    const int64_t width = padded(sequence.problem.Dv);
    float* into = values + r * width;
    for (int64_t begin = keys.begin, end; begin < keys.end; begin = end) {
      end = keys.end - begin > CHAIN ? begin + CHAIN : keys.end;
      std::memset(row_values, 0, size_t(width) * sizeof(float));
      for (int64_t j = begin; j < end; ++j) {
        if (!visible(sequence, rows[r], first + j)) continue;
        const float weight = scores[r * KEY_BLOCK + j];
        const auto weighted = [=](vec a, vec v) {
          return weight == 0.0f ? a + (v - v == vec{} ? vec{} : v) : fma(broadcast(weight), v, a);
        };
        map_row(row_values, width, weighted, row_values, block.values + j * width);
      }
      map_row(into, width, [](vec a, vec v) { return a + v; }, into, row_values);
    }
  }
};

template <class T>
class Forward {
 public:
  explicit Forward(const AttentionForward& a)
      : a_(a),
        p_(a.problem),
        query_blocks_((p_.H / p_.G * p_.T + QUERY_BLOCK - 1) / QUERY_BLOCK),
        key_blocks_((p_.S + KEY_BLOCK - 1) / KEY_BLOCK),
        chunks_((p_.S + KEY_CHUNK - 1) / KEY_CHUNK),
        prepacked_(query_blocks_ > 1 ? p_.B * p_.G * key_blocks_ : 0),
        packed_(prepacked_ * (packed_keys_size(p_) + values_size(p_) + LANES)) {}

  bool run() {
    if (!packed_.ok()) return false;
    if (prepacked_ > 0) pack_all();
    const int64_t tasks = p_.B * p_.G * query_blocks_;
    // Few tasks over many keys (decoding): chunks of keys are tasks too, and are merged afterwards.
    const bool split = prepacked_ == 0 && chunks_ > 1 && tasks < 4 * runtime.threads();
    return split ? run_chunks(tasks) : run_blocks(tasks);
  }

 private:
  struct Task {
    Sequence sequence;
    int64_t g;
    QueryBlock block;
  };
  Task task_at(int64_t task) const {
    const int64_t q = task % query_blocks_, head = task / query_blocks_;
    const Sequence sequence(p_, head / p_.G);
    return {sequence, head % p_.G, query_block(sequence, head % p_.G, q * QUERY_BLOCK)};
  }

  float* packed_at(int64_t b, int64_t g, int64_t block) const {
    const int64_t size = packed_keys_size(p_) + values_size(p_) + LANES;
    return packed_.data() + ((b * p_.G + g) * key_blocks_ + block) * size;
  }

  void pack_all() {
    parallel_for(prepacked_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % key_blocks_, g = i / key_blocks_ % p_.G, b = i / key_blocks_ / p_.G;
        const int64_t keys = Sequence(p_, b).keys, first = block * KEY_BLOCK;
        if (first >= keys) continue;
        float* at = packed_at(b, g, block);
        float* values = at + packed_keys_size(p_);
        const KeyRange range = intersect({first, first + KEY_BLOCK}, {0, keys});
        values[values_size(p_)] = pack_block<T>(p_, b, g, range, at, values).finite ? 1.0f : 0.0f;
      }
    });
  }

  KeyBlock block_at(const Task& t, KeyRange keys, Workspace& w) const {
    if (prepacked_ == 0) {
      return pack_block<T>(p_, t.sequence.batch, t.g, keys, w.packed_keys, w.values);
    }
    const float* at = packed_at(t.sequence.batch, t.g, keys.begin / KEY_BLOCK);
    const float* values = at + packed_keys_size(p_);
    return {at, values, values[values_size(p_)] != 0.0f};
  }

  void load_queries(const Task& t, float* queries) const {
    for (int64_t r = 0; r < t.block.count; ++r) {
      const ScoreRow& row = t.block.rows[r];
      const T* q = row_at(static_cast<const T*>(p_.q), p_.q_strides, t.sequence.batch, row.h, row.t);
      copy_rows(q, 0, 1, p_.D, query_scale(p_), queries + r * padded(p_.D));
    }
  }

  // The softmax of a task's rows over one chunk of keys, from nothing.
  void attend_chunk(const Task& t, int64_t chunk, Workspace& w, Partial into) const {
    const int64_t rows = t.block.count, width = padded(p_.Dv);
    into.clear(rows, width);
    float sums[QUERY_BLOCK * LANES] = {};
    const KeyRange keys = intersect(t.block.keys, {chunk * KEY_CHUNK, (chunk + 1) * KEY_CHUNK});
    for (int64_t first = keys.begin / KEY_BLOCK * KEY_BLOCK; first < keys.end; first += KEY_BLOCK) {
      const int64_t end = first + KEY_BLOCK < t.sequence.keys ? first + KEY_BLOCK : t.sequence.keys;
      const KeyBlock block = block_at(t, {first, end}, w);
      for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        RowTile tile{t.sequence,
                     t.block.rows + r,
                     rows - r < TILE_ROWS ? rows - r : TILE_ROWS,
                     w.queries + r * padded(p_.D),
                     into.highest + r,
                     sums + r * LANES,
                     into.values + r * width,
                     w.scores,
                     w.row_values};
        tile.attend(block, first, end - first);
      }
    }
    for (int64_t r = 0; r < rows; ++r) into.sum[r] = sum_lanes(load(sums + r * LANES));
  }

  void write(const Task& t, Partial& state) const {
    const int64_t width = padded(p_.Dv);
    for (int64_t r = 0; r < t.block.count; ++r) {
      const ScoreRow& row = t.block.rows[r];
      if (p_.sinks != nullptr) add_sink(state, r, p_.sinks[row.h] * LOG2E);
      const float sum = state.sum[r], scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      T* out = row_at(static_cast<T*>(a_.out), a_.out_strides, t.sequence.batch, row.h, row.t);
      map_row(out, p_.Dv, [=](vec v) { return v * scale; }, state.values + r * width);
      const double lse = state.highest[r] / LOG2E_EXACT + std::log(double(sum));
      a_.lse[(t.sequence.batch * p_.H + row.h) * p_.T + row.t] = sum == 0.0f ? -INFINITY : float(lse);
    }
  }

  // A sink's exponential joins the sum and nothing else.
  void add_sink(Partial& state, int64_t r, float sink) const {
    const float highest = state.highest[r] > sink ? state.highest[r] : sink;
    const float scale = exp2_one(state.highest[r] - highest);
    state.sum[r] = state.sum[r] * scale + exp2_one(sink - highest);
    state.highest[r] = highest;
    float* values = state.values + r * padded(p_.Dv);
    map_row(values, padded(p_.Dv), [=](vec v) { return v * scale; }, values);
  }

  bool run_blocks(int64_t tasks) {
    Failure no_memory;
    parallel_tasks(tasks, [&](const auto& next) {
      Workspace w(p_);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) {
        const Task t = task_at(tasks - 1 - i);  // causal tasks with more keys first
        load_queries(t, w.queries);
        Partial state(w.partials, QUERY_BLOCK), chunk_state(w.partials + w.partial_size, QUERY_BLOCK);
        state.clear(t.block.count, padded(p_.Dv));
        for (int64_t c = t.block.keys.begin / KEY_CHUNK; c * KEY_CHUNK < t.block.keys.end; ++c) {
          attend_chunk(t, c, w, chunk_state);
          merge(state, chunk_state, t.block.count, padded(p_.Dv));
        }
        write(t, state);
      }
    });
    return !no_memory.happened();
  }

  bool run_chunks(int64_t tasks) {
    const int64_t size = Partial::size(p_, QUERY_BLOCK);
    const Scratch partials(tasks * chunks_ * size);
    if (!partials.ok()) return false;
    Failure no_memory;
    parallel_tasks(tasks * chunks_, [&](const auto& next) {
      Workspace w(p_);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) {
        const Task t = task_at(i / chunks_);
        load_queries(t, w.queries);
        attend_chunk(t, i % chunks_, w, Partial(partials.data() + i * size, QUERY_BLOCK));
      }
    });
    if (no_memory.happened()) return false;
    for (int64_t i = 0; i < tasks; ++i) {
      const Task t = task_at(i);
      Partial state(partials.data() + i * chunks_ * size, QUERY_BLOCK);
      for (int64_t c = 1; c < chunks_; ++c) {
        merge(state, Partial(partials.data() + (i * chunks_ + c) * size, QUERY_BLOCK), t.block.count, padded(p_.Dv));
      }
      write(t, state);
    }
    return true;
  }

  const AttentionForward& a_;
  const AttentionProblem& p_;
  int64_t query_blocks_, key_blocks_, chunks_, prepacked_;
  Scratch packed_;
};

}  // namespace

bool attention_forward(const AttentionForward& a) {
  if (a.problem.B * a.problem.H * a.problem.T == 0) return true;
  return with_dtype(a.problem.dtype, [&](auto t) { return Forward<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
