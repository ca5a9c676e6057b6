// What the row-wise kernels (norms, softmax) share: sums along a row, a parameter vector as float32, and the two-stage
// sum of a parameter's gradient over rows.
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

// Sum over i of term(a[i], ...) in float32. Four accumulators hide the latency of the addition.
template <class Term, class... Rows>
INLINE float sum_over_rows_of(int64_t width, const Term& term, const Rows*... rows) {
  vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    sum[0] += term(load(rows + i)...);
    sum[1] += term(load(rows + i + LANES)...);
    sum[2] += term(load(rows + i + 2 * LANES)...);
    sum[3] += term(load(rows + i + 3 * LANES)...);
  }
  for (; i + LANES <= width; i += LANES) sum[0] += term(load(rows + i)...);
  // Lanes behind the end are zeroed after the term: a term of zeros need not be zero.
  if (i < width) {
    float tail[LANES];
    store(tail, term(load_partial(rows + i, width - i)...));
    sum[1] += load_partial(tail, width - i);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
template <class A, class Term>
INLINE float sum_over_row(const A* a, int64_t width, const Term& term) {
  return sum_over_rows_of(width, term, a);
}
template <class A, class B, class C, class Term>
INLINE float sum_over_rows(const A* a, const B* b, const C* c, int64_t width, const Term& term) {
  return sum_over_rows_of(width, term, a, b, c);
}

// A weight or bias of `width` values as float32: the caller's own memory where it is float32 already, else a copy;
// `fill` where there is none.
class RowParameter {
 public:
  RowParameter(const void* values, Dtype dtype, int64_t width, float fill)
      : copy_(values != nullptr && dtype == Dtype::float32 ? 0 : width) {
    if (values != nullptr && dtype == Dtype::float32) {
      data_ = static_cast<const float*>(values);
      return;
    }
    data_ = copy_.data();
    if (!copy_.ok()) return;
    with_dtype(dtype, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(values);
      for (int64_t i = 0; i < width; ++i) copy_.data()[i] = from == nullptr ? fill : load_one(from + i);
      return true;
    });
  }
  bool ok() const { return data_ != nullptr; }
  const float* data() const { return data_; }

 private:
  Scratch copy_;
  const float* data_;
};

// The gradient of a row parameter, summed over rows: each of a fixed number of blocks of rows has a partial sum of its
// own, and reduce() adds them in order. `total` may be null: then the blocks only split the work.
class RowPartials {
 public:
  RowPartials(float* total, int64_t rows, int64_t width)
      : total_(total),
        rows_(rows),
        width_(width),
        blocks_(rows < MAX_BLOCKS ? rows : MAX_BLOCKS),
        partials_(total == nullptr ? 0 : blocks_ * width) {}
  bool ok() const { return partials_.ok(); }

  template <class F>
  void for_blocks(const F& body) {
    parallel_for(blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        float* partial = total_ == nullptr ? nullptr : partials_.data() + b * width_;
        if (partial != nullptr) std::memset(partial, 0, size_t(width_) * sizeof(float));
        body(b * rows_ / blocks_, (b + 1) * rows_ / blocks_, partial);
      }
    });
  }

  void reduce() {
    if (total_ == nullptr) return;
    std::memset(total_, 0, size_t(width_) * sizeof(float));
    for (int64_t b = 0; b < blocks_; ++b) {
      const float* partial = partials_.data() + b * width_;
      for_lanes(
          width_, [&](int64_t i) { store(total_ + i, load(total_ + i) + load(partial + i)); },
          [&](int64_t i, int64_t n) {
            store_partial(total_ + i, load_partial(total_ + i, n) + load_partial(partial + i, n), n);
          });
    }
  }

 private:
  static constexpr int64_t MAX_BLOCKS = 64;
  float* total_;
  int64_t rows_, width_, blocks_;
  Scratch partials_;
};

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
