// attention, backward: key/value heads of sequences over threads; each takes its blocks of keys in order, and for each
// the blocks of query rows that see it (Dao, FlashAttention-2, 2023, algorithm 2).
//
// Five products of T * S * D multiply-adds a head, against two of the forward pass: bound by multiply-adds. Scores are
// recomputed from q, k and lse. dk and dv grow in a block's scratch, dq in a float32 copy of its head: every sum is
// made by one thread in a fixed order, so the result is deterministic. A second order of loops to split one head over
// threads would recompute the scores once more.
#include "attention_dropout.h"
#include "attention_scores.h"
#include "parallel.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
class Backward {
 public:
  explicit Backward(const AttentionBackward& a)
      : a_(a), p_(a.problem), group_(p_.H / p_.G), wide_(padded(p_.D)), wide_v_(padded(p_.Dv)) {}

  bool run() {
    Failure no_memory;
    parallel_tasks(p_.B * p_.G, [&](const auto& next) {
      Workspace w(*this);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) run_head(Sequence(p_, i / p_.G), i % p_.G, w);
    });
    return !no_memory.happened();
  }

 private:
  // What one thread works with: `rows` is every query of a key/value head, head by head.
  struct Workspace {
    explicit Workspace(const Backward& b)
        : rows(b.group_ * b.p_.T),
          memory(rows * (2 * b.wide_ + b.wide_v_ + 1) + KEY_BLOCK * (3 * b.wide_ + 2 * b.wide_v_) +
                 2 * QUERY_BLOCK * KEY_BLOCK + KEY_BLOCK + QUERY_BLOCK * b.wide_ + 13 * LANES) {
      if (!memory.ok()) return;
      float* at = memory.data();
      const auto take = [&at](int64_t floats) {
        float* taken = at;
        at += round_up(floats, LANES);
        return taken;
      };
      queries = take(rows * b.wide_);
      dqueries = take(rows * b.wide_);
      douts = take(rows * b.wide_v_);
      deltas = take(rows);
      keys = take(KEY_BLOCK * b.wide_);
      packed_keys = take(KEY_BLOCK * b.wide_);
      packed_values = take(KEY_BLOCK * b.wide_v_);
      dkeys = take(KEY_BLOCK * b.wide_);
      dvalues = take(KEY_BLOCK * b.wide_v_);
      scores = take(QUERY_BLOCK * KEY_BLOCK);
      dscores = take(QUERY_BLOCK * KEY_BLOCK);
      capped = take(KEY_BLOCK);
      finite_queries = take(QUERY_BLOCK * b.wide_);
    }
    int64_t rows;
    Scratch memory;
    float *queries, *dqueries, *douts, *deltas, *keys, *packed_keys, *packed_values, *dkeys, *dvalues;
    float *scores, *dscores, *capped, *finite_queries;
    bool queries_are_finite;
  };

  void run_head(const Sequence& s, int64_t g, Workspace& w) {
    load_rows(s, g, w);
    std::memset(w.dqueries, 0, size_t(w.rows * wide_) * sizeof(float));
    for (int64_t first = 0; first < p_.S; first += KEY_BLOCK) {
      const KeyRange block = intersect({first, first + KEY_BLOCK}, {0, p_.S});
      std::memset(w.dkeys, 0, size_t(KEY_BLOCK * wide_) * sizeof(float));
      std::memset(w.dvalues, 0, size_t(KEY_BLOCK * wide_v_) * sizeof(float));
      const KeyRange valid = intersect(block, {0, s.keys});
      if (!valid.empty()) run_keys(s, g, valid, w);
      write_keys(s.batch, g, block, w);
    }
    for (int64_t r = 0; r < w.rows; ++r) {
      T* dq = row_at(static_cast<T*>(a_.dq), a_.dq_strides, s.batch, g * group_ + r / p_.T, r % p_.T);
      map_row(dq, p_.D, [=](vec v) { return v * p_.scale; }, w.dqueries + r * wide_);
    }
  }

  // Queries (times query_scale) and dout of a head as float32, and delta = dout . out - dlse of each row; the sinks'
  // gradient.
  void load_rows(const Sequence& s, int64_t g, Workspace& w) {
    w.queries_are_finite = true;
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      double dsink = 0.0;
      for (int64_t t = 0; t < p_.T; ++t) {
        const int64_t r = (h - g * group_) * p_.T + t, at = (s.batch * p_.H + h) * p_.T + t;
        const T* out = row_at(static_cast<const T*>(a_.out), a_.out_strides, s.batch, h, t);
        const T* q = row_at(static_cast<const T*>(p_.q), p_.q_strides, s.batch, h, t);
        w.queries_are_finite &= copy_rows(q, 0, 1, p_.D, query_scale(p_), w.queries + r * wide_);
        copy_rows(row_at(static_cast<const T*>(a_.dout), a_.dout_strides, s.batch, h, t), 0, 1, p_.Dv, 1.0f,
                  w.douts + r * wide_v_);
        w.deltas[r] = row_dot(w.douts + r * wide_v_, out) - (a_.dlse == nullptr ? 0.0f : a_.dlse[at]);
        if (a_.dsinks != nullptr) dsink -= std::exp(double(p_.sinks[h]) - double(a_.lse[at])) * w.deltas[r];
      }
      if (a_.dsinks != nullptr) a_.dsinks[s.batch * p_.H + h] = float(dsink);
    }
  }

  // dout . out, summed as the tiles sum dout . v: so the gradient of a row that sees one key is 0, and not what two
  // orders of summation differ by.
  float row_dot(const float* dout, const T* out) const {
    float copy[LANES] = {};
    vec total = {}, sum = {};
    for (int64_t d = 0; d < p_.Dv; ++d) {
      if (d % CHAIN == 0) {
        total += sum;
        sum = vec{};
      }
      if (d % LANES == 0) store(copy, p_.Dv - d < LANES ? load_partial(out + d, p_.Dv - d) : load(out + d));
      sum = fma(broadcast(dout[d]), broadcast(copy[d % LANES]), sum);
    }
    return (total + sum)[0];
  }

  void run_keys(const Sequence& s, int64_t g, KeyRange keys, Workspace& w) {
    const int64_t count = keys.end - keys.begin;
    const T* k = row_at(static_cast<const T*>(p_.k), p_.k_strides, s.batch, g, keys.begin);
    const T* v = row_at(static_cast<const T*>(p_.v), p_.v_strides, s.batch, g, keys.begin);
    if (!copy_rows(k, p_.k_strides[2], count, p_.D, 1.0f, w.keys)) keep_finite(w.keys, count * wide_, w.keys);
    pack_keys(k, p_.k_strides[2], count, p_.D, w.packed_keys);
    pack_keys(v, p_.v_strides[2], count, p_.Dv, w.packed_values);
    for (int64_t r = 0; r < w.rows; r += QUERY_BLOCK) {
      run_block(s, g, r, w.rows - r < QUERY_BLOCK ? w.rows - r : QUERY_BLOCK, keys, w);
    }
  }

  static void keep_finite(const float* from, int64_t count, float* to) {
    map_row(to, count, [](vec v) { return v - v == vec{} ? v : vec{}; }, from);
  }

  // QUERY_BLOCK rows from `first` against one block of keys.
  void run_block(const Sequence& s, int64_t g, int64_t first, int64_t count, KeyRange keys, Workspace& w) {
    KeyRange seen[QUERY_BLOCK / TILE_ROWS];  // of each tile of rows, counted from the block's first key
    KeyRange any{0, 0};
    for (int64_t r = 0; r < count; r += TILE_ROWS) {
      const int64_t rows = count - r < TILE_ROWS ? count - r : TILE_ROWS;
      seen[r / TILE_ROWS] = score_tile(s, g, first + r, rows, keys, r, w);
      any = hull(any, seen[r / TILE_ROWS]);
    }
    if (any.empty()) return;
    const float* queries = w.queries + first * wide_;
    if (!w.queries_are_finite) {
      keep_finite(queries, count * wide_, w.finite_queries);
      queries = w.finite_queries;
    }
    // Columns of the score tiles are rows of dk and dv: each tile of keys takes the query rows that see it.
    for (int64_t j = any.begin / TILE_ROWS * TILE_ROWS; j < any.end; j += TILE_ROWS) {
      const int64_t width = any.end - j < TILE_ROWS ? any.end - j : TILE_ROWS;
      KeyRange rows{0, 0};
      for (int64_t r = 0; r < count; r += TILE_ROWS) {
        if (!intersect(seen[r / TILE_ROWS], {j, j + width}).empty()) rows = hull(rows, {r, r + TILE_ROWS});
      }
      rows.end = rows.end < count ? rows.end : count;
      const int64_t depth = rows.end - rows.begin, at = rows.begin * KEY_BLOCK + j;
      accumulate_product(width, {w.scores + at, 1, KEY_BLOCK}, w.douts + (first + rows.begin) * wide_v_,
                         w.dvalues + j * wide_v_, wide_v_, depth);
      accumulate_product(width, {w.dscores + at, 1, KEY_BLOCK}, queries + rows.begin * wide_, w.dkeys + j * wide_,
                         wide_, depth);
    }
  }

  // Probabilities and score gradients of a tile of rows, at row `at` of the score tiles, zeros where a row sees
  // nothing; dq's share. The keys that the tile sees, counted from the block's first.
  KeyRange score_tile(const Sequence& s, int64_t g, int64_t first, int64_t count, KeyRange keys, int64_t at,
                      Workspace& w) {
    ScoreRow rows[TILE_ROWS];
    KeyRange seen{0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (first + i) % p_.T;
      rows[i] = {g * group_ + (first + i) / p_.T, t, s.range(t)};
      seen = hull(seen, intersect(rows[i].range, keys));
    }
    float* scores = w.scores + at * KEY_BLOCK;
    float* dscores = w.dscores + at * KEY_BLOCK;
    std::memset(scores, 0, size_t(count * KEY_BLOCK) * sizeof(float));
    std::memset(dscores, 0, size_t(count * KEY_BLOCK) * sizeof(float));
    if (seen.empty()) return seen;
    seen = {seen.begin - keys.begin, seen.end - keys.begin};
    const int64_t begin = seen.begin / LANES * LANES, end = round_up(seen.end, LANES);
    multiply_packed(w.queries + first * wide_, count, w.packed_keys, p_.D, begin, end, scores);
    multiply_packed(w.douts + first * wide_v_, count, w.packed_values, p_.Dv, begin, end, dscores);
    for (int64_t i = 0; i < count; ++i) {
      const float lse = a_.lse[(s.batch * p_.H + rows[i].h) * p_.T + rows[i].t];
      const int64_t j = i * KEY_BLOCK + begin;
      score_row(s, rows[i], keys.begin + begin, end - begin, lse, w.deltas[first + i], scores + j, dscores + j,
                w.capped);
    }
    accumulate_product(count, {dscores + seen.begin, KEY_BLOCK, 1}, w.keys + seen.begin * wide_,
                       w.dqueries + first * wide_, wide_, seen.end - seen.begin);
    return seen;
  }

  // In: q.k and dout.v of one row. Out: dropped probabilities, and the gradient of q.k * scale.
  void score_row(const Sequence& s, const ScoreRow& row, int64_t first, int64_t count, float lse, float delta,
                 float* scores, float* dscores, float* capped) {
    if (p_.softcap != 0.0f) {
      map_row(capped, count, [](vec v) { return tanh(v); }, scores);
    }
    finish_scores(s, row, first, scores, count);
    // exp(score - lse) as 2^(score - shift) * 2^(shift - lse), the latter exact: a difference of the two would be
    // rounded at the size of lse. A row that sees nothing has lse -inf and probabilities 0, not exp(-inf + inf).
    const double total = lse == -INFINITY ? 0.0 : double(lse) * LOG2E_EXACT;
    const float shift = std::fabs(total) < 60.0 ? 0.0f : float(std::rint(total));
    const float scale = float(std::exp2(double(shift) - total));
    map_row(scores, count, [=](vec v) { return exp2(v - shift) * scale; }, scores);
    if (p_.dropout_threshold == 0) {
      // 0 * (inf or NaN) must not reach dq: what a row may not see has no gradient.
      map_row(dscores, count, [=](vec e, vec d) { return e == 0.0f ? vec{} : e * (d - delta); }, scores, dscores);
    } else {
      float kept[KEY_BLOCK];
      std::memcpy(kept, scores, size_t(count) * sizeof(float));
      drop_scores(s, row, first, kept, count);
      const auto gradient = [=](vec e, vec k, vec d) { return e == 0.0f ? vec{} : k * d - e * delta; };
      map_row(dscores, count, gradient, scores, kept, dscores);
      std::memcpy(scores, kept, size_t(count) * sizeof(float));
    }
    if (p_.softcap != 0.0f) {
      map_row(dscores, count, [](vec d, vec c) { return d * (1.0f - c * c); }, dscores, capped);
    }
  }

  void write_keys(int64_t b, int64_t g, KeyRange keys, Workspace& w) {
    const float scale = p_.softcap == 0.0f ? float(1.0 / LOG2E_EXACT) : p_.softcap;  // scale / query_scale
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      map_row(
          row_at(static_cast<T*>(a_.dk), a_.dk_strides, b, g, j), p_.D, [=](vec v) { return v * scale; },
          w.dkeys + (j - keys.begin) * wide_);
      map_row(
          row_at(static_cast<T*>(a_.dv), a_.dv_strides, b, g, j), p_.Dv, [](vec v) { return v; },
          w.dvalues + (j - keys.begin) * wide_v_);
    }
  }

  const AttentionBackward& a_;
  const AttentionProblem& p_;
  int64_t group_, wide_, wide_v_;
};

}  // namespace

bool attention_backward(const AttentionBackward& a) {
  return with_dtype(a.problem.dtype, [&](auto t) { return Backward<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
