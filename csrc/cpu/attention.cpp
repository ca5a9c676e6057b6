// attention, forward: blocks of query rows over threads, each against blocks of keys (Dao, FlashAttention-2, 2023),
// with both products in register tiles (attention_tile.h).
//
// Each product does T * S * D multiply-adds a head: bound by them for long T, by reading K and V for short. A head's K
// and V are packed once for all its query rows; where those are few (decoding), they are packed block by block, or
// read as they lie. Work behind the causal edge or outside the window is cut at tiles of TILE_ROWS queries and LANES
// keys. Query heads that share a key/value head form one long row of queries, so that decoding reads K and V once for
// them all. Rows never mix, and keys are taken in a fixed order: a row's bits do not depend on its block, thread or
// batch, nor on which of these ways it comes by.
#include "attention_softmax.h"
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
  const int64_t group = s.problem.H / s.problem.G, all = group * s.queries;
  QueryBlock block;
  if (first >= all) return block;
  int64_t h = g * group + first / s.queries, t = first % s.queries;
  for (int64_t r = first; r < all && r < first + QUERY_BLOCK; ++r) {
    const KeyRange range = s.range(t);
    block.rows[block.count++] = {h, t, range};
    block.keys = hull(block.keys, range);
    if (++t == s.queries) t = 0, ++h;
  }
  return block;
}

// How K and V reach the tiles.
enum class Packing { none, of_block, of_head, of_all };

// Queries and results of Q, keys and values of K.
template <class Q, class K>
class Forward {
 public:
  explicit Forward(const AttentionForward& a) : a_(a), p_(a.problem) {
    int64_t queries = p_.T, keys = p_.S;
    if (p_.q_ends != nullptr) {
      queries = keys = 0;
      for (int64_t b = 0; b < p_.B; ++b) {
        const Sequence s(p_, b);
        queries = s.queries > queries ? s.queries : queries;
        keys = s.keys > keys ? s.keys : keys;
      }
    }
    const int64_t rows = p_.H / p_.G * queries;
    rows_ = rows < QUERY_BLOCK ? rows : QUERY_BLOCK;
    query_blocks_ = (rows + QUERY_BLOCK - 1) / QUERY_BLOCK;
    key_blocks_ = (keys + KEY_BLOCK - 1) / KEY_BLOCK;
    chunks_ = (keys + KEY_CHUNK - 1) / KEY_CHUNK;
    // Below about 64k multiply-adds a second thread costs more than it saves.
    is_small_ = p_.B * p_.H * queries * keys * (p_.D + p_.Dv) < 65536;
    const bool whole_vectors = p_.D % (VECTOR_WORDS<K> * WORD<K>) == 0 && p_.Dv % (COLUMN_VECTORS<K> * LANES) == 0;
    if (query_blocks_ <= 1) {
      packing_ = rows <= 2 * TILE_ROWS && whole_vectors ? Packing::none : Packing::of_block;
    } else {
      packing_ = p_.B * p_.G >= 4 * runtime.threads() ? Packing::of_head : Packing::of_all;
    }
  }

  bool run() {
    if (packing_ == Packing::of_head) return run_heads();
    if (packing_ == Packing::of_all) return run_packed();
    // Few tasks over many keys (decoding): chunks of keys are tasks too, and are merged afterwards.
    const bool split = !is_small_ && chunks_ > 1 && p_.B * p_.G < 4 * runtime.threads();
    return split ? run_chunks() : run_blocks(nullptr);
  }

 private:
  // What one thread works with.
  struct Workspace {
    explicit Workspace(const Forward& f)
        : partial_size(Partial::size(f.p_, f.rows_)),
          memory(f.rows_ * padded(words<K>(f.p_.D)) + TILE_ROWS * KEY_BLOCK + 2 * partial_size + f.block_space() +
                 f.head_space()) {
      if (!memory.ok()) return;
      queries = memory.data();
      tile.scores = queries + f.rows_ * padded(words<K>(f.p_.D));
      partials = tile.scores + TILE_ROWS * KEY_BLOCK;
      block = partials + 2 * partial_size;
      tile.values = block;
      head = block + f.block_space();
    }
    int64_t partial_size;
    Scratch memory;
    float *queries, *partials, *block, *head;
    TileSpace tile;
  };

  int64_t keys_size() const { return KEY_BLOCK * words<K>(p_.D); }
  int64_t values_size() const { return KEY_BLOCK / WORD<K> * padded(p_.Dv); }
  int64_t packed_size() const { return keys_size() + values_size() + BlockScales<K>::FLOATS + LANES; }
  int64_t block_space() const {
    if (packing_ == Packing::none) return TILE_ROWS * padded(p_.Dv) + values_size();
    return packing_ == Packing::of_block ? packed_size() : 0;
  }
  int64_t head_space() const { return packing_ == Packing::of_head ? key_blocks_ * packed_size() : 0; }

  struct Task {
    Sequence sequence;
    int64_t g;
    QueryBlock block;
  };
  Task task_at(int64_t head, int64_t query_block_index) const {
    const Sequence sequence(p_, head / p_.G);
    return {sequence, head % p_.G, query_block(sequence, head % p_.G, query_block_index * QUERY_BLOCK)};
  }

  // body(next) on every thread, or on this one alone where that is faster.
  template <class F>
  void for_tasks(int64_t count, const F& body) const {
    parallel_tasks(count, body, is_small_);
  }

  static KeyRange block_range(const Sequence& s, int64_t block) {
    return intersect({block * KEY_BLOCK, (block + 1) * KEY_BLOCK}, {0, s.keys});
  }

  // One block of keys, packed: K, V, their scales and whether V is finite.
  void pack(const Sequence& s, int64_t g, int64_t block, float* at) const {
    const BlockRows<K> rows(s, g, block_range(s, block));
    float* values = at + keys_size();
    float* scales = values + values_size();
    pack_keys(rows.keys, rows.count, p_.D, at);
    const bool finite = pack_values(rows.values, rows.count, p_.Dv, values) && rows.scales.finite(rows.count);
    std::memcpy(scales, &rows.scales, BlockScales<K>::FLOATS * sizeof(float));
    scales[BlockScales<K>::FLOATS] = finite ? 1.0f : 0.0f;
  }
  KeyBlock<K> packed(const float* at) const {
    const float* values = at + keys_size();
    const float* scales = values + values_size();
    return {nullptr, at, values, scales[BlockScales<K>::FLOATS] != 0.0f,
            reinterpret_cast<const BlockScales<K>*>(scales)};
  }

  void load_queries(const Task& t, float* queries) const {
    for (int64_t r = 0; r < t.block.count; ++r) {
      const ScoreRow& row = t.block.rows[r];
      const Q* q = t.sequence.query_row(static_cast<const Q*>(p_.q), p_.q_strides, row.h, row.t);
      copy_words(q, p_.D, query_scale(p_), queries + r * padded(words<K>(p_.D)));
    }
  }

  // The softmax of a task's rows over one chunk of keys, from nothing. `head`: its packed blocks, if they are.
  void attend_chunk(const Task& t, int64_t chunk, const float* head, Workspace& w, Partial into) const {
    const int64_t width = padded(p_.Dv);
    into.clear(t.block.count, width);
    float sums[QUERY_BLOCK * LANES] = {};
    const KeyRange keys = intersect(t.block.keys, {chunk * KEY_CHUNK, (chunk + 1) * KEY_CHUNK});
    for (int64_t block = keys.begin / KEY_BLOCK; block * KEY_BLOCK < keys.end; ++block) {
      const auto attend = [&](const KeyBlock<K>& b) { attend_block(t, b, block, w, sums, into); };
      if (packing_ == Packing::none) {
        const BlockRows<K> rows(t.sequence, t.g, block_range(t.sequence, block));
        attend({&rows, nullptr, nullptr, rows.scales.finite(rows.count), &rows.scales});
      } else if (packing_ == Packing::of_block) {
        pack(t.sequence, t.g, block, w.block);
        attend(packed(w.block));
      } else {
        attend(packed(head + block * packed_size()));
      }
    }
    for (int64_t r = 0; r < t.block.count; ++r) {
      into.sum[r] = sum_lanes(load(sums + r * LANES));
      // Scores of -inf only count as no keys, whatever their values are.
      if (into.sum[r] == 0.0f) std::memset(into.values + r * width, 0, size_t(width) * sizeof(float));
    }
  }

  void attend_block(const Task& t, const KeyBlock<K>& block, int64_t index, Workspace& w, float* sums,
                    Partial& into) const {
    for (int64_t r = 0; r < t.block.count; r += TILE_ROWS) {
      const int64_t count = t.block.count - r < TILE_ROWS ? t.block.count - r : TILE_ROWS;
      RowTile<K> tile{t.sequence,
                      t.g,
                      t.block.rows + r,
                      count,
                      w.queries + r * padded(words<K>(p_.D)),
                      into.highest + r,
                      sums + r * LANES,
                      into.values + r * padded(p_.Dv),
                      w.tile};
      tile.attend(block, block_range(t.sequence, index));
    }
  }

  void write(const Task& t, Partial& state) const {
    const int64_t width = padded(p_.Dv);
    for (int64_t r = 0; r < t.block.count; ++r) {
      const ScoreRow& row = t.block.rows[r];
      if (p_.sinks != nullptr) add_sink(state, r, p_.sinks[row.h] * LOG2E);
      const float sum = state.sum[r], scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      Q* out = t.sequence.query_row(static_cast<Q*>(a_.out), a_.out_strides, row.h, row.t);
      map_row(out, p_.Dv, [=](vec v) { return v * scale; }, state.values + r * width);
      const double lse = state.highest[r] / LOG2E_EXACT + std::log(double(sum));
      a_.lse[t.sequence.statistic(row.h, row.t)] = sum == 0.0f ? -INFINITY : float(lse);
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

  // One task from beginning to end.
  void attend(const Task& t, const float* head, Workspace& w) const {
    load_queries(t, w.queries);
    Partial state(w.partials, rows_), chunk_state(w.partials + w.partial_size, rows_);
    int64_t c = t.block.keys.begin / KEY_CHUNK;
    attend_chunk(t, c, head, w, state);
    for (++c; c * KEY_CHUNK < t.block.keys.end; ++c) {
      attend_chunk(t, c, head, w, chunk_state);
      merge(state, chunk_state, t.block.count, padded(p_.Dv));
    }
    write(t, state);
  }

  // Tasks are blocks of queries. `packed_heads`: of every head, if they are packed.
  bool run_blocks(const float* packed_heads) const {
    const int64_t tasks = p_.B * p_.G * query_blocks_;
    Failure no_memory;
    for_tasks(tasks, [&](const auto& next) {
      Workspace w(*this);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) {
        const int64_t task = tasks - 1 - i, head = task / query_blocks_;  // causal tasks with more keys first
        attend(task_at(head, task % query_blocks_),
               packed_heads == nullptr ? nullptr : packed_heads + head * key_blocks_ * packed_size(), w);
      }
    });
    return !no_memory.happened();
  }

  // Few heads with many queries: K and V are packed by all threads before anyone uses them.
  bool run_packed() const {
    const int64_t blocks = p_.B * p_.G * key_blocks_;
    const Scratch packed_heads(blocks * packed_size());
    if (!packed_heads.ok()) return false;
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i % key_blocks_, head = i / key_blocks_;
        const Sequence s(p_, head / p_.G);
        if (!block_range(s, block).empty()) pack(s, head % p_.G, block, packed_heads.data() + i * packed_size());
      }
    });
    return run_blocks(packed_heads.data());
  }

  // Many heads: each thread packs its own, which stays in its cache.
  bool run_heads() const {
    Failure no_memory;
    for_tasks(p_.B * p_.G, [&](const auto& next) {
      Workspace w(*this);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t head = next(); head >= 0; head = next()) {
        const Sequence s(p_, head / p_.G);
        for (int64_t block = 0; block * KEY_BLOCK < s.keys; ++block) {
          pack(s, head % p_.G, block, w.head + block * packed_size());
        }
        for (int64_t q = 0; q < query_blocks_; ++q) attend(task_at(head, q), w.head, w);
      }
    });
    return !no_memory.happened();
  }

  bool run_chunks() const {
    const int64_t tasks = p_.B * p_.G, size = Partial::size(p_, rows_);
    const Scratch partials(tasks * chunks_ * size);
    if (!partials.ok()) return false;
    Failure no_memory;
    for_tasks(tasks * chunks_, [&](const auto& next) {
      Workspace w(*this);
      if (!w.memory.ok()) return no_memory.set();
      for (int64_t i = next(); i >= 0; i = next()) {
        const Task t = task_at(i / chunks_, 0);
        load_queries(t, w.queries);
        attend_chunk(t, i % chunks_, nullptr, w, Partial(partials.data() + i * size, rows_));
      }
    });
    if (no_memory.happened()) return false;
    for (int64_t i = 0; i < tasks; ++i) {
      const Task t = task_at(i, 0);
      Partial state(partials.data() + i * chunks_ * size, rows_);
      for (int64_t c = 1; c < chunks_; ++c) {
        merge(state, Partial(partials.data() + (i * chunks_ + c) * size, rows_), t.block.count, padded(p_.Dv));
      }
      write(t, state);
    }
    return true;
  }

  const AttentionForward& a_;
  const AttentionProblem& p_;
  int64_t rows_, query_blocks_, key_blocks_, chunks_;  // rows_: of the largest block of queries
  bool is_small_;
  Packing packing_;
};

}  // namespace

// 3 dtypes + float32 queries beside 2 others = 5 builds.
bool attention_forward(const AttentionForward& a) {
  if (a.problem.B * a.problem.H * a.problem.T == 0) return true;
  const AttentionProblem& p = a.problem;
  if (p.kv_dtype == KvDtype::int8) return Forward<float, int8_t>(a).run();
  if (p.kv_dtype == KvDtype::bfloat16) return Forward<float, lone_bfloat16>(a).run();
  return with_dtype(p.dtype, [&](auto t) { return Forward<decltype(t), decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
