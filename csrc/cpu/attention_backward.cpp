// attention, backward: key/value heads of sequences over threads; each takes its blocks of keys in order, and for each
// the blocks of query rows that see it (Dao, FlashAttention-2, 2023, algorithm 2).
//
// Five products of T * S * D multiply-adds a head, against two of the forward pass: bound by multiply-adds. Scores are
// recomputed from q, k and lse. dk and dv grow in a block's scratch, dq in float32 sums of its head, one for each
// slot of key blocks, which are added in order: however many threads share a head's slots, every sum has one order and
// the result is deterministic. A mask's gradient is that of the scores it was added to: heads that share it are one
// task, so that it takes no more memory than the mask.
#include "attention_dropout.h"
#include "attention_scores.h"
#include "parallel.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Block i of keys belongs to slot i % SLOTS: a causal head's slots have about the same work.
constexpr int64_t SLOTS = 4;

template <class T>
class Backward {
 public:
  explicit Backward(const AttentionBackward& a)
      : a_(a), p_(a.problem), group_(p_.H / p_.G), wide_(padded(p_.D)), wide_v_(padded(p_.Dv)), most_queries_(p_.T) {
    if (p_.q_ends == nullptr) return;
    most_queries_ = 0;
    for (int64_t b = 0; b < p_.B; ++b) {
      const int64_t queries = Sequence(p_, b).queries;
      most_queries_ = queries > most_queries_ ? queries : most_queries_;
    }
  }

  bool run() {
    const Scratch slope_sums(a_.dslopes == nullptr ? 0 : 2 * SLOTS * p_.B * p_.H);
    if (!slope_sums.ok()) return false;
    slope_sums_ = reinterpret_cast<double*>(slope_sums.data());
    const bool by_heads = p_.B * p_.G >= 2 * runtime.threads() || p_.S <= KEY_BLOCK;
    if (!(by_heads && a_.dmask == nullptr ? run_heads() : run_slots())) return false;
    if (a_.dslopes != nullptr) write_slopes();
    return true;
  }

 private:
  // What one thread works with: `rows` is every query of a key/value head, head by head.
  struct Workspace {
    explicit Workspace(const Backward& b)
        : rows(b.group_ * b.most_queries_),
          memory(rows * (3 * b.wide_ + 2 * b.wide_v_ + 1) + b.wide_v_ + KEY_BLOCK * (3 * b.wide_ + 2 * b.wide_v_) +
                 2 * (QUERY_BLOCK + TILE_ROWS) * KEY_BLOCK + KEY_BLOCK + 16 * LANES) {
      if (!memory.ok()) return;
      float* at = memory.data();
      const auto take = [&at](int64_t floats) {
        float* taken = at;
        at += round_up(floats, LANES);
        return taken;
      };
      queries = take(rows * b.wide_);
      query_rows = take(rows * b.wide_);
      dqueries = take(rows * b.wide_);
      douts = take(rows * b.wide_v_);
      dout_rows = take(rows * b.wide_v_);
      deltas = take(rows);
      out = take(b.wide_v_);
      keys = take(KEY_BLOCK * b.wide_);
      packed_keys = take(KEY_BLOCK * b.wide_);
      packed_values = take(KEY_BLOCK * b.wide_v_);
      dkeys = take(KEY_BLOCK * b.wide_);
      dvalues = take(KEY_BLOCK * b.wide_v_);
      scores = take(QUERY_BLOCK * KEY_BLOCK);
      dscores = take(QUERY_BLOCK * KEY_BLOCK);
      tile_scores = take(TILE_ROWS * KEY_BLOCK);
      tile_dscores = take(TILE_ROWS * KEY_BLOCK);
      capped = take(KEY_BLOCK);
    }
    int64_t rows, head = -1;  // head: whose rows are loaded
    Scratch memory;
    // q and dout as words along D, and (..._rows) along the rows, the former finite.
    float *queries, *query_rows, *dqueries, *douts, *dout_rows, *deltas, *out;
    float *keys, *packed_keys, *packed_values, *dkeys, *dvalues;
    // A block's, as words along the rows; and of a tile of rows.
    float *scores, *dscores, *tile_scores, *tile_dscores, *capped;
    const float* finite_queries;   // query_rows, or queries where those are the same
    const float* dout_words;       // dout_rows, or douts
    double* slope_sums = nullptr;  // of a sequence's heads at one slot
  };

  // Many heads: a task is a head.
  bool run_heads() {
    Failure no_memory;
    parallel_tasks(p_.B * p_.G, [&](const auto& next) {
      Workspace w(*this);
      const Scratch total(w.rows * wide_);
      if (!w.memory.ok() || !total.ok()) return no_memory.set();
      for (int64_t head = next(); head >= 0; head = next()) {
        const Sequence s(p_, head / p_.G);
        for (int64_t slot = 0; slot < slots(s); ++slot) {
          run_slot(s, head, slot, w);
          add_slot(s, slot, w.dqueries, total.data());
        }
        write_queries(s, head % p_.G, 0, group_ * s.queries, total.data());
      }
    });
    return !no_memory.happened();
  }

  // Few heads: a task is a slot of a head. Or, with a gradient of the mask, of all heads that add to the same elements
  // of it, in order; of all slots, too, where an element stands for every key.
  bool run_slots() {
    const int64_t heads = p_.B * p_.G, size = group_ * most_queries_ * wide_;
    const Scratch sums(heads * SLOTS * size);
    if (!sums.ok()) return false;
    const auto apart = [&](int axis, int64_t all) {
      return a_.dmask == nullptr || a_.dmask_strides[axis] != 0 ? all : int64_t{1};
    };
    const int64_t batches = apart(0, p_.B), groups = apart(1, p_.G), parts = apart(3, SLOTS);
    Failure no_memory;
    parallel_tasks(batches * groups * parts, [&](const auto& next) {
      Workspace w(*this);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) {
        for (int64_t b = i / parts / groups; b < p_.B; b += batches) {
          const Sequence s(p_, b);
          for (int64_t g = i / parts % groups; g < p_.G; g += groups) {
            for (int64_t slot = i % parts; slot < slots(s); slot += parts) {
              w.dqueries = sums.data() + ((b * p_.G + g) * SLOTS + slot) * size;
              run_slot(s, b * p_.G + g, slot, w);
            }
          }
        }
      }
    });
    if (no_memory.happened()) return false;
    for (int64_t head = 0; head < heads; ++head) {
      const Sequence s(p_, head / p_.G);
      float* total = sums.data() + head * SLOTS * size;
      for (int64_t slot = 1; slot < slots(s); ++slot) add_slot(s, slot, total + slot * size, total);
      write_queries(s, head % p_.G, 0, group_ * s.queries, total);
    }
    return true;
  }

  // Keys of a sequence that have a gradient, past its length too.
  int64_t all_keys(const Sequence& s) const { return p_.k_ends == nullptr ? p_.S : s.keys; }
  int64_t slots(const Sequence& s) const {
    const int64_t blocks = (all_keys(s) + KEY_BLOCK - 1) / KEY_BLOCK;
    return blocks < 1 ? 1 : (blocks < SLOTS ? blocks : SLOTS);
  }

  void add_slot(const Sequence& s, int64_t slot, const float* sums, float* total) const {
    const int64_t size = group_ * s.queries * wide_;
    if (slot == 0) {
      std::memcpy(total, sums, size_t(size) * sizeof(float));
    } else {
      map_row(total, size, [](vec a, vec b) { return a + b; }, total, sums);
    }
  }

  void write_queries(const Sequence& s, int64_t g, int64_t begin, int64_t end, const float* total) const {
    for (int64_t r = begin; r < end; ++r) {
      T* dq = s.query_row(static_cast<T*>(a_.dq), a_.dq_strides, g * group_ + r / s.queries, r % s.queries);
      map_row(dq, p_.D, [=](vec v) { return v * p_.scale; }, total + r * wide_);
    }
  }

  // dk and dv of a slot's blocks of keys; its share of dq into w.dqueries.
  void run_slot(const Sequence& s, int64_t head, int64_t slot, Workspace& w) {
    const int64_t g = head % p_.G;
    w.rows = group_ * s.queries;
    if (w.head != head) load_rows(s, g, w);
    w.head = head;
    if (slot == 0 && a_.dsinks != nullptr) write_sinks(s, g, w);
    if (a_.dslopes != nullptr) {
      w.slope_sums = slope_sums_ + (slot * p_.B + s.index) * p_.H;
      for (int64_t h = g * group_; h < (g + 1) * group_; ++h) w.slope_sums[h] = 0.0;
    }
    std::memset(w.dqueries, 0, size_t(w.rows * wide_) * sizeof(float));
    for (int64_t first = slot * KEY_BLOCK; first < all_keys(s); first += SLOTS * KEY_BLOCK) {
      const KeyRange block = intersect({first, first + KEY_BLOCK}, {0, all_keys(s)});
      const int64_t count = block.end - block.begin;
      std::memset(w.dkeys, 0, size_t(count * wide_) * sizeof(float));
      std::memset(w.dvalues, 0, size_t(count * wide_v_) * sizeof(float));
      const KeyRange valid = intersect(block, {0, s.keys});
      if (!valid.empty()) run_keys(s, g, valid, w);
      write_keys(s, g, block, w);
    }
  }

  // The rows of a head, and delta = dout . out - dlse of each.
  void load_rows(const Sequence& s, int64_t g, Workspace& w) {
    bool finite = true;
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      for (int64_t t = 0; t < s.queries; ++t) {
        const int64_t r = (h - g * group_) * s.queries + t, at = s.statistic(h, t);
        finite &= copy_words(query(s, g, r), p_.D, query_scale(p_), w.queries + r * padded(words<T>(p_.D)));
        float* dout = w.douts + r * padded(words<T>(p_.Dv));
        copy_words(dout_row(s, g, r), p_.Dv, 1.0f, dout);
        copy_words(s.query_row(static_cast<const T*>(a_.out), a_.out_strides, h, t), p_.Dv, 1.0f, w.out);
        w.deltas[r] = dot_words(dout, w.out) - (a_.dlse == nullptr ? 0.0f : a_.dlse[at]);
      }
    }
    w.finite_queries = w.query_rows, w.dout_words = w.dout_rows;
    if constexpr (IN_PAIRS<T>) {
      for (int64_t r = 0; r < w.rows; r += 2) {
        const int64_t count = w.rows - r < 2 ? 1 : 2, next = r + count - 1;
        const T* queries[] = {query(s, g, r), query(s, g, next)};
        const T* douts[] = {dout_row(s, g, r), dout_row(s, g, next)};
        pack_rows(queries, count, p_.D, finite_or_zero, w.query_rows + r / 2 * wide_);
        pack_rows(douts, count, p_.Dv, [](vec v) { return v; }, w.dout_rows + r / 2 * wide_v_);
      }
    } else {
      w.dout_words = w.douts;
      if (finite) {
        w.finite_queries = w.queries;
      } else {
        map_row(w.query_rows, w.rows * wide_, finite_or_zero, w.queries);
      }
    }
  }

  void write_sinks(const Sequence& s, int64_t g, const Workspace& w) const {
    const float* delta = w.deltas;
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      double dsink = 0.0;
      for (int64_t t = 0; t < s.queries; ++t) {
        dsink -= std::exp(double(p_.sinks[h]) - double(a_.lse[s.statistic(h, t)])) * *delta++;
      }
      a_.dsinks[s.batch * p_.H + h] = float(dsink);
    }
  }

  void write_slopes() const {
    for (int64_t b = 0; b < p_.B; ++b) {
      for (int64_t h = 0; h < p_.H; ++h) {
        double total = 0.0;
        for (int64_t slot = 0; slot < slots(Sequence(p_, b)); ++slot)
          total += slope_sums_[(slot * p_.B + b) * p_.H + h];
        a_.dslopes[b * p_.H + h] = float(total);
      }
    }
  }

  const T* query(const Sequence& s, int64_t g, int64_t r) const {
    return s.query_row(static_cast<const T*>(p_.q), p_.q_strides, g * group_ + r / s.queries, r % s.queries);
  }
  const T* dout_row(const Sequence& s, int64_t g, int64_t r) const {
    return s.query_row(static_cast<const T*>(a_.dout), a_.dout_strides, g * group_ + r / s.queries, r % s.queries);
  }

  // dout . out, summed as the tiles sum dout . v: so the gradient of a row that sees one key is 0, and not what two
  // orders of summation differ by.
  float dot_words(const float* dout, const float* out) const {
    vec total = {}, sum = {};
    for (int64_t w = 0; w < words<T>(p_.Dv); ++w) {
      if (w % CHAIN == 0) {
        total += sum;
        sum = vec{};
      }
      sum = ProductsOf<T>::add(sum, broadcast(dout[w]), broadcast(out[w]));
    }
    return (total + sum)[0];
  }

  void run_keys(const Sequence& s, int64_t g, KeyRange keys, Workspace& w) {
    const BlockRows<T> rows(s, g, keys);
    pack_values(rows.keys, rows.count, p_.D, w.keys);
    pack_keys(rows.keys, rows.count, p_.D, w.packed_keys);
    pack_keys(rows.values, rows.count, p_.Dv, w.packed_values);
    for (int64_t r = 0; r < w.rows; r += QUERY_BLOCK) {
      run_block(s, g, r, w.rows - r < QUERY_BLOCK ? w.rows - r : QUERY_BLOCK, keys, w);
    }
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
    // Columns of the score tiles are rows of dk and dv: each tile of keys takes the query rows that see it.
    for (int64_t j = any.begin / TILE_ROWS * TILE_ROWS; j < any.end; j += TILE_ROWS) {
      const int64_t width = any.end - j < TILE_ROWS ? any.end - j : TILE_ROWS;
      KeyRange rows{0, 0};
      for (int64_t r = 0; r < count; r += TILE_ROWS) {
        if (!intersect(seen[r / TILE_ROWS], {j, j + width}).empty()) rows = hull(rows, {r, r + TILE_ROWS});
      }
      rows.end = rows.end < count ? rows.end : count;
      const int64_t begin = rows.begin / WORD<T>, depth = words<T>(rows.end) - begin, at = begin * KEY_BLOCK + j;
      const int64_t row = first / WORD<T> + begin;
      accumulate_product<ProductsOf<T>>(width, {w.scores + at, 1, KEY_BLOCK},
                                        MatrixRows{w.dout_words + row * wide_v_, wide_v_}, w.dvalues + j * wide_v_,
                                        wide_v_, depth);
      accumulate_product<ProductsOf<T>>(width, {w.dscores + at, 1, KEY_BLOCK},
                                        MatrixRows{w.finite_queries + row * wide_, wide_}, w.dkeys + j * wide_, wide_,
                                        depth);
    }
  }

  // Probabilities and score gradients of a tile of rows, at row `at` of the block's, zeros where a row sees nothing;
  // dq's share. The keys that the tile sees, counted from the block's first.
  KeyRange score_tile(const Sequence& s, int64_t g, int64_t first, int64_t count, KeyRange keys, int64_t at,
                      Workspace& w) {
    ScoreRow rows[TILE_ROWS];
    KeyRange seen{0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (first + i) % s.queries;
      rows[i] = {g * group_ + (first + i) / s.queries, t, s.range(t)};
      seen = hull(seen, intersect(rows[i].range, keys));
    }
    float* block_scores = w.scores + at / WORD<T> * KEY_BLOCK;
    float* block_dscores = w.dscores + at / WORD<T> * KEY_BLOCK;
    std::memset(block_scores, 0, size_t(words<T>(count) * KEY_BLOCK) * sizeof(float));
    std::memset(block_dscores, 0, size_t(words<T>(count) * KEY_BLOCK) * sizeof(float));
    if (seen.empty()) return seen;
    seen = {seen.begin - keys.begin, seen.end - keys.begin};
    const int64_t begin = seen.begin / LANES * LANES, end = round_up(seen.end, LANES);
    float* scores = IN_PAIRS<T> ? w.tile_scores : block_scores;
    float* dscores = IN_PAIRS<T> ? w.tile_dscores : block_dscores;
    const int64_t width = words<T>(p_.D), width_v = words<T>(p_.Dv);
    multiply_packed<ProductsOf<T>>(w.queries + first * padded(width), count, w.packed_keys, width, begin, end, scores);
    multiply_packed<ProductsOf<T>>(w.douts + first * padded(width_v), count, w.packed_values, width_v, begin, end,
                                   dscores);
    for (int64_t i = 0; i < count; ++i) {
      const float lse = a_.lse[s.statistic(rows[i].h, rows[i].t)];
      const int64_t j = i * KEY_BLOCK + begin;
      score_row(s, rows[i], keys.begin + begin, end - begin, lse, w.deltas[first + i], scores + j, dscores + j, w);
    }
    if constexpr (IN_PAIRS<T>) {
      pair_rows(scores, count, begin, end, block_scores);
      pair_rows(dscores, count, begin, end, block_dscores);
      for (int64_t i = 0; i < count; ++i) round_weights(dscores + i * KEY_BLOCK, begin, end);
    }
    const int64_t from = seen.begin / WORD<T>;
    accumulate_product<ProductsOf<T>>(count, {dscores + from, KEY_BLOCK, 1}, MatrixRows{w.keys + from * wide_, wide_},
                                      w.dqueries + first * wide_, wide_, words<T>(seen.end) - from);
    return seen;
  }

  // Columns [begin, end) of a tile's rows, rounded, as words along the rows.
  static void pair_rows(const float* tile, int64_t count, int64_t begin, int64_t end, float* paired) {
    for (int64_t i = 0; i < count; i += 2, tile += 2 * KEY_BLOCK, paired += KEY_BLOCK) {
      for (int64_t j = begin; j < end; j += LANES) {
        store(paired + j, round_to_pairs(load(tile + j), i + 1 < count ? load(tile + KEY_BLOCK + j) : vec{}));
      }
    }
  }

  // In: q.k and dout.v of one row. Out: dropped probabilities, and the gradient of q.k * scale.
  void score_row(const Sequence& s, const ScoreRow& row, int64_t first, int64_t count, float lse, float delta,
                 float* scores, float* dscores, const Workspace& w) {
    float* capped = w.capped;
    const float unscaled = IN_PAIRS<T> ? query_scale(p_) : 1.0f;
    if (p_.softcap != 0.0f) {
      map_row(capped, count, [=](vec v) { return tanh(v * unscaled); }, scores);
    }
    const float left = finish_scores(s, row, first, unscaled, scores, count);
    // exp(score - lse) as 2^(score - shift) * 2^(shift - lse), the latter exact: a difference of the two would be
    // rounded at the size of lse. A row that sees nothing has lse -inf and probabilities 0, not exp(-inf + inf).
    const double total = lse == -INFINITY ? 0.0 : double(lse) * LOG2E_EXACT;
    const float shift = std::fabs(total) < 60.0 ? 0.0f : float(std::rint(total));
    const float scale = float(std::exp2(double(shift) - total));
    map_row(scores, count, [=](vec v) { return exp2((IN_PAIRS<T> ? v * left : v) - shift) * scale; }, scores);
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
    const KeyRange seen = intersect(row.range, {first, first + count});
    if (!seen.empty()) {
      const float* gradient = dscores + (seen.begin - first);
      if (a_.dslopes != nullptr) w.slope_sums[row.h] += slope_gradient(s, row, seen, gradient);
      if (a_.dmask != nullptr) add_mask_gradient(s, row, seen, gradient);
    }
    if (p_.softcap != 0.0f) {
      map_row(dscores, count, [](vec d, vec c) { return d * (1.0f - c * c); }, dscores, capped);
    }
  }

  // What scores of `keys`, of the gradient dscores, give to the slope of their head.
  static float slope_gradient(const Sequence& s, const ScoreRow& row, KeyRange keys, const float* dscores) {
    float distances[KEY_BLOCK];
    const int64_t count = keys.end - keys.begin, first = s.offset + row.t - keys.begin;
    for (int64_t j = 0; j < count; ++j) distances[j] = float(first < j ? j - first : first - j);
    return -sum_over_row(count, [](vec distance, vec d) { return distance * d; }, distances, dscores);
  }

  void add_mask_gradient(const Sequence& s, const ScoreRow& row, KeyRange keys, const float* dscores) const {
    const auto& strides = a_.dmask_strides;
    const int64_t count = keys.end - keys.begin;
    float* dmask = a_.dmask + s.batch * strides[0] + row.h * strides[1] + row.t * strides[2] + keys.begin * strides[3];
    if (strides[3] == 0) {
      *dmask += sum_over_row(count, [](vec d) { return d; }, dscores);
    } else {
      map_row(dmask, count, [](vec a, vec d) { return a + d; }, dmask, dscores);
    }
  }

  void write_keys(const Sequence& s, int64_t g, KeyRange keys, Workspace& w) {
    // The queries were multiplied by query_scale, or not.
    const float scale = IN_PAIRS<T> ? p_.scale : (p_.softcap == 0.0f ? float(1.0 / LOG2E_EXACT) : p_.softcap);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      T* dk = s.key_row(static_cast<T*>(a_.dk), a_.dk_strides, g, j);
      T* dv = s.key_row(static_cast<T*>(a_.dv), a_.dv_strides, g, j);
      map_row(dk, p_.D, [=](vec v) { return v * scale; }, w.dkeys + (j - keys.begin) * wide_);
      map_row(dv, p_.Dv, [](vec v) { return v; }, w.dvalues + (j - keys.begin) * wide_v_);
    }
  }

  const AttentionBackward& a_;
  const AttentionProblem& p_;
  int64_t group_, wide_, wide_v_, most_queries_;
  double* slope_sums_ = nullptr;  // (SLOTS, B, H)
};

}  // namespace

bool attention_backward(const AttentionBackward& a) {
  return with_dtype(a.problem.dtype, [&](auto t) { return Backward<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
