// linear, forward: blocks of rows times blocks of outputs over threads, each output a dot product of two contiguous
// rows.
//
// ROWS x OUTPUTS accumulators, vectors along K, stay in registers: ROWS + OUTPUTS loads for ROWS * OUTPUTS
// multiply-adds, so that many rows are bound by multiply-adds and one row by reading the weight, which is used as it
// lies in memory, unpacked on the way. K is cut at K_BLOCK: a block of x stays in L2, and sums lose fewer bits. An
// element's sum has one order whatever the number of rows: its bits do not depend on the batch.
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int ROWS = REGISTERS == 32 ? 4 : 3;
constexpr int OUTPUTS = REGISTERS == 32 ? 6 : 4;
constexpr int64_t ROW_BLOCK = 96;
constexpr int64_t OUTPUT_BLOCK = 96;
constexpr int64_t K_BLOCK = 1024;
static_assert(ROW_BLOCK % ROWS == 0 && OUTPUT_BLOCK % OUTPUTS == 0 && K_BLOCK % LANES == 0);

// Rows of a weight (N, K) as float32 vectors. partial() is asked for behind the last whole vector only.
template <class W>
struct PlainRows {
  const W* data;
  int64_t K;
  INLINE vec whole(int64_t n, int64_t k) const { return load(data + n * K + k); }
  INLINE vec partial(int64_t n, int64_t k, int64_t count) const { return load_partial(data + n * K + k, count); }
};

struct KRange {
  int64_t begin, end;
};
template <int N>
struct Count {
  static constexpr int value = N;
};

// sums[r][n] (+)= x[r] . w[n] over [k, end) for R rows of x (stride x_row) and C outputs from n.
template <int R, int C, class Weight>
[[gnu::noinline]] void dot_tile(const float* x, int64_t x_row, const Weight& w, int64_t n, KRange range, float* sums,
                                int64_t sums_row) {
  vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = vec{};
  int64_t k = range.begin;
  for (; k + LANES <= range.end; k += LANES) {
    vec left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load(x + r * x_row + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const vec right = w.whole(n + c, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = fma(left[r], right, sum[r][c]);
    }
  }
  if (k < range.end) {
    for (int c = 0; c < C; ++c) {
      const vec right = w.partial(n + c, k, range.end - k);
      for (int r = 0; r < R; ++r) sum[r][c] = fma(load_partial(x + r * x_row + k, range.end - k), right, sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = sums + r * sums_row + c;
      *to = range.begin == 0 ? sum_lanes(sum[r][c]) : *to + sum_lanes(sum[r][c]);
    }
  }
}

// All outputs in [n, n_end) of all rows of a block.
template <class Weight>
void multiply_block(const float* x, int64_t x_row, int64_t rows, const Weight& w, int64_t n_begin, int64_t n_end,
                    KRange range, float* sums) {
  const auto columns = [&](int64_t n, auto outputs) {
    constexpr int C = decltype(outputs)::value;
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) {
      dot_tile<ROWS, C>(x + r * x_row, x_row, w, n, range, sums + r * OUTPUT_BLOCK + (n - n_begin), OUTPUT_BLOCK);
    }
    for (; r < rows; ++r) {
      dot_tile<1, C>(x + r * x_row, x_row, w, n, range, sums + r * OUTPUT_BLOCK + (n - n_begin), OUTPUT_BLOCK);
    }
  };
  int64_t n = n_begin;
  for (; n + OUTPUTS <= n_end; n += OUTPUTS) columns(n, Count<OUTPUTS>{});
  for (; n < n_end; ++n) columns(n, Count<1>{});
}

template <class T, class Weight>
bool forward(const LinearForward& a, const Weight& w) {
  const RowParameter bias(a.bias, a.bias_dtype, a.N, 0.0f);
  if (!bias.ok()) return false;
  const int64_t width = (a.K + LANES - 1) / LANES * LANES;
  const int64_t row_blocks = (a.M + ROW_BLOCK - 1) / ROW_BLOCK, output_blocks = (a.N + OUTPUT_BLOCK - 1) / OUTPUT_BLOCK;
  Failure no_memory;
  const auto work = [&](const auto& next) {
    const bool copies = sizeof(T) != 4;
    const Scratch memory(ROW_BLOCK * OUTPUT_BLOCK + (copies ? ROW_BLOCK * width : 0));
    if (!memory.ok()) return no_memory.set();
    float* sums = memory.data();
    float* copy = sums + ROW_BLOCK * OUTPUT_BLOCK;
    int64_t copied = -1;
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t m = task / output_blocks * ROW_BLOCK, n = task % output_blocks * OUTPUT_BLOCK;
      const int64_t rows = a.M - m < ROW_BLOCK ? a.M - m : ROW_BLOCK;
      const int64_t n_end = a.N - n < OUTPUT_BLOCK ? a.N : n + OUTPUT_BLOCK;
      const T* x = static_cast<const T*>(a.x) + m * a.K;
      const float* rows_of_x = copy;
      if constexpr (sizeof(T) == 4) {
        rows_of_x = x;
      } else if (copied != m) {
        for (int64_t r = 0; r < rows; ++r) map_row(copy + r * width, a.K, [](vec v) { return v; }, x + r * a.K);
        copied = m;
      }
      for (int64_t k = 0; k < a.K; k += K_BLOCK) {
        const KRange range{k, a.K - k < K_BLOCK ? a.K : k + K_BLOCK};
        multiply_block(rows_of_x, copies ? width : a.K, rows, w, n, n_end, range, sums);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = sums + r * OUTPUT_BLOCK;
        T* y = static_cast<T*>(a.y) + (m + r) * a.N + n;
        if (a.K == 0) {
          map_row(y, n_end - n, [](vec b) { return b; }, bias.data() + n);
        } else if (a.bias == nullptr) {
          map_row(y, n_end - n, [](vec s) { return s; }, row);
        } else {
          map_row(y, n_end - n, [](vec s, vec b) { return s + b; }, row, bias.data() + n);
        }
      }
    }
  };
  // A second thread pays from about 64k multiply-adds.
  if (a.M * a.N * a.K < 65536) {
    int64_t task = 0;
    work([&] { return task < row_blocks * output_blocks ? task++ : int64_t{-1}; });
  } else {
    parallel_tasks(row_blocks * output_blocks, work);
  }
  return !no_memory.happened();
}

template <class T>
bool forward(const LinearForward& a) {
  switch (a.format) {
    case WeightFormat::bfloat16:
      return forward<T>(a, PlainRows<bfloat16>{static_cast<const bfloat16*>(a.weight), a.K});
    case WeightFormat::float16:
      return forward<T>(a, PlainRows<float16>{static_cast<const float16*>(a.weight), a.K});
    default:
      return forward<T>(a, PlainRows<float>{static_cast<const float*>(a.weight), a.K});
  }
}

}  // namespace

bool linear_forward(const LinearForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
