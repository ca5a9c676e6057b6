// What this machine can do at most, for the benchmarks to divide by: multiply-adds in registers, reads and copies.
//
// Every thread works on a range of its own, `passes` or `rounds` times without meeting the others. Nothing here is
// shared with the ops' kernels but the vector type, so that a slow kernel cannot lower its own limit.
#include "lanes.h"
#include "parallel.h"
#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Independent chains: the latency (4 or 5 cycles) times the two ports that current cores have, inside 16 registers.
constexpr int CHAINS = 10;
constexpr int UNROLLED = 8;  // vectors for each turn of the loops over memory

// body(thread) once on every thread.
template <class F>
void on_every_thread(const F& body) {
  parallel_for(runtime.threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
  });
}

// Thread t's share of `count` floats, cut at whole turns of the loop.
struct Range {
  Range(int64_t t, int64_t count) {
    const int64_t turns = count / (UNROLLED * LANES), threads = runtime.threads();
    begin = t * turns / threads * UNROLLED * LANES;
    end = t + 1 == threads ? count : (t + 1) * turns / threads * UNROLLED * LANES;
    whole = begin + (end - begin) / (UNROLLED * LANES) * UNROLLED * LANES;
  }
  int64_t begin, whole, end;
};

// Keeps the compiler from merging passes over the same memory.
INLINE void memory_may_change() { asm volatile("" ::: "memory"); }

// Each chain's values stay near 1, so that no number becomes slow to compute with.
template <class Step>
float run_chains(int64_t rounds, const Step& step) {
  vec sum[CHAINS];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; ++c) sum[c] = broadcast(float(c + 1));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) sum[c] = step(sum[c]);
  }
  vec total = vec{};
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; ++c) total += sum[c];
  return sum_lanes(total);
}

float read_range(const float* x, const Range& range) {
  vec sum[UNROLLED] = {};
  for (int64_t i = range.begin; i < range.whole; i += UNROLLED * LANES) {
#pragma GCC unroll 8
    for (int u = 0; u < UNROLLED; ++u) sum[u] += load(x + i + u * LANES);
  }
  float total = 0.0f;
  for (int u = 0; u < UNROLLED; ++u) total += sum_lanes(sum[u]);
  for (int64_t i = range.whole; i < range.end; ++i) total += x[i];
  return total;
}

template <bool PAST_CACHES>
void copy_range(const float* x, float* y, const Range& range) {
  for (int64_t i = range.begin; i < range.whole; i += UNROLLED * LANES) {
#pragma GCC unroll 8
    for (int u = 0; u < UNROLLED; ++u) {
      const vec v = load(x + i + u * LANES);
      PAST_CACHES ? store_past_caches(y + i + u * LANES, v) : store(y + i + u * LANES, v);
    }
  }
  for (int64_t i = range.whole; i < range.end; ++i) y[i] = x[i];
  if (PAST_CACHES) order_stores();
}

}  // namespace

bool roofline_fma(const RooflineChains& a) {
  const vec factor = broadcast(a.factor), term = broadcast(a.term);
  on_every_thread([&](int64_t t) {
    a.result[t] = run_chains(a.rounds, [=](vec v) __attribute__((always_inline)) { return fma(v, factor, term); });
  });
  *a.operations = 2 * LANES * CHAINS * a.rounds * runtime.threads();
  return true;
}

bool roofline_bf16_pairs(const RooflineChains& a) {
  const vec factor = broadcast(a.factor), term = broadcast(a.term);
  on_every_thread([&](int64_t t) {
    a.result[t] =
        run_chains(a.rounds, [=](vec v) __attribute__((always_inline)) { return add_pair_products(v, factor, term); });
  });
  *a.operations = (HAS_BFLOAT16_PAIRS ? 4 : 0) * LANES * CHAINS * a.rounds * runtime.threads();
  return true;
}

bool roofline_read(const RooflineRead& a) {
  on_every_thread([&](int64_t t) {
    const Range range(t, a.count);
    float total = 0.0f;
    for (int64_t pass = 0; pass < a.passes; ++pass) {
      total += read_range(a.x, range);
      memory_may_change();
    }
    a.result[t] = total;
  });
  return true;
}

bool roofline_copy(const RooflineCopy& a) {
  on_every_thread([&](int64_t t) {
    const Range range(t, a.count);
    for (int64_t pass = 0; pass < a.passes; ++pass) {
      a.past_caches ? copy_range<true>(a.x, a.y, range) : copy_range<false>(a.x, a.y, range);
      memory_may_change();
    }
  });
  return true;
}

}  // namespace llmcore::LLMCORE_LEVEL
