// What the row-wise kernels (norms, softmax) share: maps and sums along a row, a parameter vector as float32, and the
// two-stage sum of a parameter's gradient over rows.
#pragma once

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

// out[i] = f(rows[i]...) in float32, rounded once. `out` may be one of the rows.
template <class Out, class F, class... Rows>
INLINE void map_row(Out* out, int64_t width, const F& f, const Rows*... rows) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, f(load(rows + i)...));
  if (i < width) store_partial(out + i, f(load_partial(rows + i, width - i)...), width - i);
}

// Sum over i of term(rows[i]...) in float32. Four accumulators hide the latency of the addition.
template <class Term, class... Rows>
INLINE float sum_over_row(int64_t width, const Term& term, const Rows*... rows) {
  vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    sum[0] += term(load(rows + i)...);
    sum[1] += term(load(rows + i + LANES)...);
    sum[2] += term(load(rows + i + 2 * LANES)...);
    sum[3] += term(load(rows + i + 3 * LANES)...);
  }
  for (; i + LANES <= width; i += LANES) sum[0] += term(load(rows + i)...);
  // Behind the end the term is dropped, since a term of zeros need not be zero.
  if (i < width) sum[1] += first_lanes(term(load_partial(rows + i, width - i)...), width - i, 0.0f);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
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

// Rows are cut into a number of blocks that depends on nothing but their count.
INLINE int64_t row_blocks(int64_t rows) { return rows < 64 ? rows : 64; }

// body(block, begin, end) for each block of rows, over threads.
template <class F>
void for_row_blocks(int64_t rows, const F& body) {
  const int64_t blocks = row_blocks(rows);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b, b * rows / blocks, (b + 1) * rows / blocks);
  });
}

// A parameter's gradient: each block of rows adds to a partial sum of its own, reduce() adds those up in order. With a
// null `total` nothing is wanted, and every partial is null.
class RowPartials {
 public:
  RowPartials(float* total, int64_t rows, int64_t width)
      : total_(total), width_(width), blocks_(row_blocks(rows)), partials_(total == nullptr ? 0 : blocks_ * width) {
    if (total != nullptr && ok()) std::memset(partials_.data(), 0, size_t(blocks_ * width) * sizeof(float));
  }
  bool ok() const { return partials_.ok(); }
  float* partial(int64_t block) const { return total_ == nullptr ? nullptr : partials_.data() + block * width_; }

  void reduce() const {
    if (total_ == nullptr) return;
    std::memset(total_, 0, size_t(width_) * sizeof(float));
    for (int64_t b = 0; b < blocks_; ++b) {
      map_row(total_, width_, [](vec t, vec p) { return t + p; }, total_, partial(b));
    }
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
    float* sum = partials.partial(block);
    for (int64_t r = begin; r < end; ++r) {
      map_row(sum, width, [](vec s, vec v) { return s + v; }, sum, rows + r * width);
    }
  });
  partials.reduce();
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
