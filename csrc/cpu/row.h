// What the row-wise kernels (norms, softmax) share: maps and sums along a row, a parameter vector as float32, and the
// two-stage sum of a parameter's gradient over rows.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "parallel.h"
#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class F>
INLINE bool with_dtype(Dtype dtype, const F& call) {
  if (dtype == Dtype::bfloat16) return call(bfloat16{});
  if (dtype == Dtype::float16) return call(float16{});
  return call(float{});
}

// Where a result goes: past the caches when it is too large to be found there by who reads it next, and would only push
// out what is. Such a store does not read the line that it fills, a third of a copy's traffic.
template <class T>
struct Output {
  // `results` elements in all; one that overwrites its own input finds its lines in the caches. A result of a small
  // part of the last cache stays there for its reader, one as large as all of it is gone before it is read; three
  // eighths are in the middle.
  Output(void* data, int64_t results, bool in_place = false)
      : data(static_cast<T*>(data)),
        past_caches(!in_place && results * int64_t(sizeof(T)) >= runtime.cache_bytes / 8 * 3) {}
  Output operator+(int64_t offset) const {
    Output moved = *this;
    moved.data += offset;
    return moved;
  }

  // For loops that store single vectors of several rows at once: every one of them must be aligned.
  bool rows_past_caches(int64_t width) const {
    const uintptr_t last_bits = reinterpret_cast<uintptr_t>(data) | uintptr_t(width) * sizeof(T);
    return past_caches && last_bits % CACHE_LINE == 0;
  }

  T* data;
  bool past_caches;
};

// Asks for elements before they are needed.
template <class T>
INLINE void prefetch_vectors(const T* row, int vectors) {
  for (int i = 0; i < vectors * LANES; i += CACHE_LINE / int(sizeof(T))) __builtin_prefetch(row + i);
}

// out[i] = f(rows[i]...) in float32 for i in [begin, width), rounded once; `next` is what will be read after that.
template <bool PAST_CACHES, class Out, class F, class Next, class... Rows>
INLINE void map_from(int64_t begin, Out* out, int64_t width, const Next* next, const F& f, const Rows*... rows) {
  int64_t i = begin;
  for (; i + 2 * LANES <= width; i += 2 * LANES) {
    if (next != nullptr) prefetch_vectors(next + i, 2);
    const vec a = f(load(rows + i)...), b = f(load(rows + i + LANES)...);
    PAST_CACHES ? store_past_caches(out + i, a, b) : store(out + i, a, b);
  }
  for (; i < width; i += LANES) {
    const int64_t n = width - i;
    if (n >= LANES) {
      store(out + i, f(load(rows + i)...));
    } else {
      store_partial(out + i, f(load_partial(rows + i, n)...), n);
    }
  }
}
constexpr float* NOTHING = nullptr;

// out[i] = f(rows[i]...) in float32, rounded once. `out` may be one of the rows. `next` is a row that will be read
// after them: memory is kept busy while this one is computed. (The hardware fetches ahead only while it sees misses.)
template <class Out, class F, class... Rows>
INLINE void map_row(Out* out, int64_t width, const F& f, const Rows*... rows) {
  map_from<false>(0, out, width, NOTHING, f, rows...);
}
template <class Out, class Next, class F, class... Rows>
INLINE void map_row_before(const Next* next, const Output<Out>& out, int64_t width, const F& f, const Rows*... rows) {
  if (!out.past_caches) return map_from<false>(0, out.data, width, next, f, rows...);
  int64_t begin = int64_t(-reinterpret_cast<uintptr_t>(out.data) % CACHE_LINE / sizeof(Out));
  if (begin > width) begin = width;
  map_from<false>(0, out.data, begin, next, f, rows...);
  map_from<true>(begin, out.data, width, next, f, rows...);
}
template <class Out, class F, class... Rows>
INLINE void map_row(const Output<Out>& out, int64_t width, const F& f, const Rows*... rows) {
  map_row_before(NOTHING, out, width, f, rows...);
}

// The place of a loop over a row: LANES elements from `i` on, or the first `count` of them behind which are zeros.
struct WholeVector {
  template <class T>
  INLINE vec operator()(const T* row) const {
    return load(row + i);
  }
  template <class T>
  INLINE void put(T* row, vec v, bool past_caches = false) const {
    past_caches ? store_past_caches(row + i, v) : store(row + i, v);
  }
  int64_t i;
};
struct PartVector {
  template <class T>
  INLINE vec operator()(const T* row) const {
    return load_partial(row + i, count);
  }
  template <class T>
  INLINE void put(T* row, vec v, bool = false) const {
    store_partial(row + i, v, count);
  }
  int64_t i, count;
};

// body(place) for each vector of a row.
template <class F>
INLINE void for_vectors(int64_t width, const F& body) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) body(WholeVector{i});
  if (i < width) body(PartVector{i, width - i});
}

// Two sums over the same elements, each of which may be two again.
template <class First, class Second = First>
struct Both {
  First first;
  Second second;
};
template <class First, class Second>
INLINE Both<First, Second>& operator+=(Both<First, Second>& a, const Both<First, Second>& b) {
  a.first += b.first;
  a.second += b.second;
  return a;
}
template <class First, class Second>
INLINE auto sum_lanes(const Both<First, Second>& v)
    -> Both<decltype(sum_lanes(v.first)), decltype(sum_lanes(v.second))> {
  return {sum_lanes(v.first), sum_lanes(v.second)};
}
template <class First, class Second>
INLINE Both<First, Second> first_lanes(const Both<First, Second>& v, int64_t n, float fill) {
  return {first_lanes(v.first, n, fill), first_lanes(v.second, n, fill)};
}

// sums[r] = sum of term(r, place) over row r, for R rows at once so that their latencies overlap; the term is a vec, or
// several. Several accumulators hide the latency of the addition. A row's order of additions does not depend on R.
template <int R, class Sum, class Term>
INLINE void sum_over_rows(Sum (&sums)[R], int64_t width, const Term& term) {
  using Terms = decltype(term(0, WholeVector{0}));
  constexpr int CHAINS = sizeof(Terms) == sizeof(vec) ? 4 : 2;
  Terms sum[R][CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * LANES <= width; i += CHAINS * LANES) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) sum[r][c] += term(r, WholeVector{i + c * LANES});
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    int64_t rest = i;
    for (; rest + LANES <= width; rest += LANES) sum[r][0] += term(r, WholeVector{rest});
    // Behind the end the term is dropped, since a term of zeros need not be zero.
    if (rest < width) sum[r][CHAINS / 2] += first_lanes(term(r, PartVector{rest, width - rest}), width - rest, 0.0f);
#pragma GCC unroll 2
    for (int half = CHAINS / 2; half >= 1; half /= 2) {
#pragma GCC unroll 2
      for (int c = 0; c < half; ++c) sum[r][c] += sum[r][c + half];
    }
    sums[r] = sum_lanes(sum[r][0]);
  }
}

// Sum of term(place) over one row.
template <class Term>
INLINE float sum_over_row_at(int64_t width, const Term& term) {
  float sum[1];
  sum_over_rows(sum, width, [&](int, auto at) __attribute__((always_inline)) { return term(at); });
  return sum[0];
}

// Sum over i of term(rows[i]...) in float32.
template <class Term, class... Rows>
INLINE float sum_over_row(int64_t width, const Term& term, const Rows*... rows) {
  return sum_over_row_at(width, [&](auto at) __attribute__((always_inline)) { return term(at(rows)...); });
}

// Rows that share the loops over their elements, in kernels that reduce more than once.
constexpr int GROUP = 2;

// body(first, count of rows as a constant) over rows [begin, end): R at a time, then one by one.
template <int R, class F>
INLINE void for_rows(int64_t begin, int64_t end, const F& body) {
  int64_t r = begin;
  for (; r + R <= end; r += R) body(r, std::integral_constant<int, R>{});
  for (; r < end; ++r) body(r, std::integral_constant<int, 1>{});
}

template <class T>
INLINE float max_over_row(int64_t width, const T* row) {
  vec highest[4];
  for (vec& h : highest) h = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    for (int u = 0; u < 4; ++u) highest[u] = max(load(row + i + u * LANES), highest[u]);
  }
  for (; i + LANES <= width; i += LANES) highest[0] = max(load(row + i), highest[0]);
  if (i < width) highest[1] = max(first_lanes(load_partial(row + i, width - i), width - i, -INFINITY), highest[1]);
  return max_lanes(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

// A weight or bias of `width` values as float32: the caller's own memory where it is float32 already, else a copy;
// `fill` where there is none.
class RowParameter {
 public:
  RowParameter(const void* values, Dtype dtype, int64_t width, float fill)
      : copy_(values != nullptr && dtype == Dtype::float32 ? 0 : width), data_(copy_.data()) {
    if (!copy_.ok()) return;
    if (values == nullptr) {
      for (int64_t i = 0; i < width; ++i) copy_.data()[i] = fill;
    } else if (dtype == Dtype::float32) {
      data_ = static_cast<const float*>(values);
    } else {
      with_dtype(dtype, [&](auto t) {
        map_row(copy_.data(), width, [](vec v) { return v; }, static_cast<const decltype(t)*>(values));
        return true;
      });
    }
  }
  bool ok() const { return copy_.ok(); }
  const float* data() const { return data_; }

 private:
  Scratch copy_;
  const float* data_;
};

// A bias that may be absent: then nothing is added, where a row of zeros would be read.
class Bias {
 public:
  Bias(const void* values, Dtype dtype, int64_t width)
      : parameter_(values, dtype, values == nullptr ? 0 : width, 0.0f), present_(values != nullptr) {}
  bool ok() const { return parameter_.ok(); }

  // y[i] = sums[i] + the bias from `first` on, rounded once; y may be sums.
  template <class T>
  void add_to(const float* sums, int64_t first, int64_t count, T* y) const {
    if (present_) {
      map_row(y, count, [](vec s, vec b) { return s + b; }, sums, parameter_.data() + first);
    } else {
      map_row(y, count, [](vec s) { return s; }, sums);
    }
  }
  // The same in place.
  void add_to(float* sums, int64_t first, int64_t count) const {
    if (present_) add_to(sums, first, count, sums);
  }

 private:
  RowParameter parameter_;
  bool present_;
};

// Rows are cut into a number of blocks that depends on nothing but their count: enough for any number of threads, but
// none so short that its sums cost as much as its rows.
INLINE int64_t row_blocks(int64_t rows) {
  const int64_t blocks = (rows + 7) / 8;
  return blocks < 64 ? blocks : 64;
}

// body(block, begin, end) for each block of rows, over threads.
template <class F>
void for_row_blocks(int64_t rows, const F& body) {
  const int64_t blocks = row_blocks(rows);
  parallel_stores(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b, b * rows / blocks, (b + 1) * rows / blocks);
  });
}

// A parameter's gradient: each block of rows adds to a partial sum of its own, reduce() adds those up in order. With a
// null `total` nothing is wanted, and every partial is null.
class RowPartials {
 public:
  RowPartials(float* total, int64_t rows, int64_t width)
      : total_(total), width_(width), blocks_(row_blocks(rows)), partials_(total == nullptr ? 0 : blocks_ * width) {}
  bool ok() const { return partials_.ok(); }

  // What a block adds to: zeros, written by the thread that will.
  float* zeroed(int64_t block) const {
    if (total_ == nullptr) return nullptr;
    float* partial = partials_.data() + block * width_;
    std::memset(partial, 0, size_t(width_) * sizeof(float));
    return partial;
  }

  void reduce() const {
    if (total_ == nullptr) return;
    for_vectors(width_, [&](auto at) {
      vec sum = {};
      for (int64_t b = 0; b < blocks_; ++b) sum += at(partials_.data() + b * width_);
      at.put(total_, sum);
    });
  }

 private:
  float* total_;
  int64_t width_, blocks_;
  Scratch partials_;
};

// total[i] = the sum over rows of rows[r][i]. False when there was no memory.
template <class T>
bool sum_rows(const T* rows, int64_t count, int64_t width, float* total) {
  const RowPartials partials(total, count, width);
  if (!partials.ok()) return false;
  for_row_blocks(count, [&](int64_t block, int64_t begin, int64_t end) {
    float* sum = partials.zeroed(block);
    for (int64_t r = begin; r < end; ++r) {
      map_row(sum, width, [](vec s, vec v) { return s + v; }, sum, rows + r * width);
    }
  });
  partials.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
