// C = A B^T for matrices of any size: few rows (gemm_few.h) or many (gemm_many.h).
//
// The inner axis is cut into blocks, which end a sum; an element adds up its blocks in order, and the sums of either
// way have the same order. So an element's bits are a matter of its row of A and its row of B (a column of C) alone:
// not of the rows beside it, nor of the thread.
#pragma once

#include "gemm_few.h"
#include "gemm_many.h"
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int64_t COLUMN_BLOCK = 512;
constexpr int64_t FEW_ROWS = 32;
constexpr int64_t STRIP_WORDS = int64_t{1} << 20;  // of B, packed by each thread,
constexpr int64_t STRIP_WORDS_A_ROW = 1024;        // or less: for few rows it stays in the second cache
// Of the operand that is packed by all of them: the other one is packed anew for each chunk, so that a large product,
// beside whose operands and result the memory is little, gets large ones: half the packing of B at 2048 x 768 x 3072.
constexpr int64_t CHUNK_WORDS = int64_t{1} << 20, LARGEST_CHUNK_WORDS = int64_t{3} << 20;

// A second thread pays from so many multiply-adds on, or from so many values of B where each is read once.
constexpr int64_t ALONE = int64_t{1} << 20, ALONE_READ = int64_t{1} << 16;
// Sharing what is packed pays from so many multiply-adds a thread on; below, each takes so many rows or columns at
// least.
constexpr int64_t APART = int64_t{1} << 27, SHORTEST_PART = 64;

enum class Cut { as_threads_need, whole_blocks };

// Few rows: a thread reads one stream, whose end is as near to the others' as small blocks allow.
template <class Products, class TA, class TB, class Finish>
bool gemm_few(int64_t M, int64_t N, int64_t K, const Matrix<TA>& a, const Matrix<TB>& b, const Finish& finish,
              Cut columns_cut, int64_t threads) {
  int64_t step = COLUMN_BLOCK;
  while (columns_cut == Cut::as_threads_need && step > LANES && (N + step - 1) / step < 32 * threads) step /= 2;
  const int64_t blocks = (N + step - 1) / step;
  Failure no_memory;
  parallel_for(blocks, threads == 1 ? blocks : 1, [&](int64_t block, int64_t end) {
    const int64_t rows = (M + ROWS - 1) / ROWS * ROWS;
    const Scratch memory(rows * (step + padded_lanes<Products>(K)));
    if (!memory.ok()) return no_memory.set();
    float *sums = memory.data(), *packed = sums + rows * step;
    pack_few<Products>(a, M, K, packed);
    const TB* b_end = b.at(end < blocks ? end * step : N, 0);
    for (int64_t n = block * step; block < end; ++block, n += step) {
      const int64_t columns = N - n < step ? N - n : step;
      multiply_few<Products>(packed, b.from(n, 0), M, columns, K, b_end, sums, step);
      for (int64_t m = 0; m < M; ++m) finish(m, n, columns, sums + m * step);
    }
  });
  return !no_memory.happened();
}

// Columns of a strip, in whole panels and about `most`: as many strips for one thread as for another, and some for
// each, for one may be disturbed.
INLINE int64_t strip_columns(int64_t N, int64_t most, int64_t threads) {
  const int64_t panels = (N + PANEL - 1) / PANEL, widest = most < COLUMN_BLOCK ? most / PANEL : COLUMN_BLOCK / PANEL;
  int64_t strips = widest < 1 ? panels : (panels + widest - 1) / widest;
  strips = ((strips < 4 * threads ? 4 * threads : strips) + threads - 1) / threads * threads;
  return (panels + strips - 1) / strips * PANEL;
}

// Pieces of one memory, one for each thread that comes.
struct Pieces {
  float* data;
  int64_t words, taken = 0;
  float* take() { return data + __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED) * words; }
};

// Rows and columns of C.
struct Part {
  int64_t row, rows, column, columns;
};

// Many rows: A is packed a chunk of rows at a time, by all threads and for all of them; a thread packs a strip of B and
// takes blocks of the chunk's rows through it.
template <class Products, class TA, class TB, class Finish>
bool gemm_by_strips(const Part& part, int64_t K, const Matrix<TA>& all_a, const Matrix<TB>& all_b, const Finish& finish,
                    Cut columns_cut, int64_t threads) {
  const int64_t M = part.rows, N = part.columns;
  const Matrix<TA> a = all_a.from(part.row, 0);
  const Matrix<TB> b = all_b.from(part.column, 0);
  const DepthCut cut = b.depth == 1 ? AS_FEW_ROWS : ONE_CHAIN;
  const int64_t group = group_words<Products>(K, cut);
  const int64_t chunk_words = M * N < CHUNK_WORDS           ? CHUNK_WORDS
                              : M * N < LARGEST_CHUNK_WORDS ? M * N
                                                            : LARGEST_CHUNK_WORDS;
  const int64_t blocks_in_chunk = chunk_words / (ROW_BLOCK / LANES * (group + 1)) + 1;
  const int64_t row_blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t chunks = (row_blocks + blocks_in_chunk - 1) / blocks_in_chunk;
  const int64_t chunk_rows =
      chunks == 1 ? (M + LANES - 1) / LANES * LANES : (row_blocks + chunks - 1) / chunks * ROW_BLOCK;
  int64_t step = COLUMN_BLOCK;
  if (columns_cut == Cut::as_threads_need) {
    const int64_t for_rows = chunk_rows * STRIP_WORDS_A_ROW, most = for_rows < STRIP_WORDS ? for_rows : STRIP_WORDS;
    step = strip_columns(N, most / (group + 1) * LANES, threads);
  }
  const int64_t strips = (N + step - 1) / step, strip_groups = (step + LANES - 1) / LANES;
  // One piece of memory, the threads' strips first, a whole number of pages each.
  constexpr int64_t PAGE = 1024;  // words
  const int64_t used = strip_groups * group + STACK_SLOT * CHAINS_LOG2 + ROW_BLOCK * step;
  const int64_t strip_words = (used + PAGE - 1) / PAGE * PAGE;
  const Scratch memory(threads * strip_words + chunk_rows / LANES * group);
  if (!memory.ok()) return false;
  float* const chunk = memory.data() + threads * strip_words;
  for (int64_t first = 0; first < M; first += chunk_rows) {
    const int64_t rows = M - first < chunk_rows ? M - first : chunk_rows;
    const int64_t blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel_for(blocks, threads == 1 ? blocks : 1, [&](int64_t block, int64_t end) {
      const int64_t r = block * ROW_BLOCK, r_end = end == blocks ? rows : end * ROW_BLOCK;
      for (int64_t at = r; at < r_end; at += ROW_BLOCK) {
        const int64_t here = r_end - at < ROW_BLOCK ? r_end - at : ROW_BLOCK;
        pack_groups<Products>(a.from(first + at, 0), here, K, cut, group, chunk + at / LANES * group);
      }
    });
    // A few tasks for each thread even out their lengths.
    const int64_t wanted = (4 * threads + strips - 1) / strips, parts = threads == 1      ? 1
                                                                        : wanted < blocks ? wanted
                                                                                          : blocks;
    const int64_t part_rows = (blocks + parts - 1) / parts * ROW_BLOCK;
    Pieces own{memory.data(), strip_words};
    parallel_tasks(
        strips * parts,
        [&](const auto& next) {
          float* strip = own.take();
          float *stack = strip + strip_groups * group, *sums = stack + STACK_SLOT * CHAINS_LOG2;
          int64_t packed = -1;
          for (int64_t task = next(); task >= 0; task = next()) {
            const int64_t n = task / parts * step, columns = N - n < step ? N - n : step;
            if (packed != n) pack_groups<Products>(b.from(n, 0), columns, K, cut, group, strip);
            packed = n;
            const int64_t begin = task % parts * part_rows, end = rows - begin < part_rows ? rows : begin + part_rows;
            for (int64_t r = begin; r < end; r += ROW_BLOCK) {
              const int64_t here = end - r < ROW_BLOCK ? end - r : ROW_BLOCK;
              const auto finish_rows = [&](int64_t i, int64_t i_end, int64_t c, int64_t count) {
                for (; i < i_end; ++i) {
                  finish(part.row + first + r + i, part.column + n + c, count, sums + i * step + c);
                }
              };
              const auto finish_tile = [&](int64_t i, int64_t i_end, int64_t c, int64_t count) {
                if (columns_cut != Cut::whole_blocks) finish_rows(i, i_end, c, count);
              };
              multiply_strip<Products>(chunk + r / LANES * group, strip, here, columns, K, cut, group, stack, sums,
                                       step, finish_tile);
              if (columns_cut == Cut::whole_blocks) finish_rows(0, here, 0, columns);
            }
          }
        },
        threads == 1);
  }
  return true;
}

// Many rows: B is packed a chunk of columns at a time, by all threads and for all of them; a thread packs a block of
// rows of A, which stays in its second cache, and takes it through the chunk. So what one core packs another reads once
// only: some per cent faster than by strips, most where the inner axis is short.
template <class Products, class TA, class TB, class Finish>
bool gemm_by_rows(int64_t M, int64_t N, int64_t K, const Matrix<TA>& a, const Matrix<TB>& b, const Finish& finish,
                  int64_t threads) {
  const DepthCut cut = b.depth == 1 ? AS_FEW_ROWS : ONE_CHAIN;
  const int64_t group = group_words<Products>(K, cut), panels = (N + PANEL - 1) / PANEL;
  const int64_t most = LARGEST_CHUNK_WORDS / (PANEL_VECS * (group + 1)) + 1, chunks = (panels + most - 1) / most;
  const int64_t chunk_columns = (panels + chunks - 1) / chunks * PANEL;
  constexpr int64_t STEP = 4 * PANEL;
  const int64_t own_words = ROW_BLOCK / LANES * group + STACK_SLOT * CHAINS_LOG2 + ROW_BLOCK * STEP;
  const Scratch memory(chunk_columns / LANES * group + threads * own_words);
  if (!memory.ok()) return false;
  float* const chunk = memory.data();
  for (int64_t first = 0; first < N; first += chunk_columns) {
    const int64_t columns = N - first < chunk_columns ? N - first : chunk_columns;
    const int64_t here_panels = (columns + PANEL - 1) / PANEL;
    parallel_for(here_panels, threads == 1 ? here_panels : 1, [&](int64_t panel, int64_t end) {
      const int64_t n = panel * PANEL, n_end = end == here_panels ? columns : end * PANEL;
      pack_groups<Products>(b.from(first + n, 0), n_end - n, K, cut, group, chunk + n / LANES * group);
    });
    Pieces own{chunk + chunk_columns / LANES * group, own_words};
    const auto take_blocks = [&](const auto& next) {
      float* block = own.take();
      float *stack = block + ROW_BLOCK / LANES * group, *sums = stack + STACK_SLOT * CHAINS_LOG2;
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t m = task * ROW_BLOCK, rows = M - m < ROW_BLOCK ? M - m : ROW_BLOCK;
        pack_groups<Products>(a.from(m, 0), rows, K, cut, group, block);
        for (int64_t n = 0; n < columns; n += STEP) {
          const auto finish_rows = [&](int64_t i, int64_t end, int64_t c, int64_t count) {
            for (; i < end; ++i) finish(m + i, first + n + c, count, sums + i * STEP + c);
          };
          multiply_strip<Products>(block, chunk + n / LANES * group, rows, columns - n < STEP ? columns - n : STEP, K,
                                   cut, group, stack, sums, STEP, finish_rows);
        }
      }
    };
    parallel_tasks((M + ROW_BLOCK - 1) / ROW_BLOCK, take_blocks, threads == 1);
  }
  return true;
}

// Which way packs fewer words: by strips B is packed anew for each chunk of A, by rows A for each chunk of B. Where B
// is not much the larger, less comes from another core by rows, however much is packed.
template <class Products>
bool packs_less_by_rows(int64_t M, int64_t N, int64_t K) {
  const int64_t lanes = padded_lanes<Products>(K), a = M * lanes, b = N * lanes;
  const int64_t by_strips = a + b * (1 + a / LARGEST_CHUNK_WORDS), by_rows = b + a * (1 + b / LARGEST_CHUNK_WORDS);
  return N <= 2 * M || by_rows < by_strips;
}

// Many rows, but little work: each thread takes a part of C, whole rows or whole columns, and packs all that it needs,
// for what another core has packed takes longer to arrive.
template <class Products, class TA, class TB, class Finish>
bool gemm_apart(int64_t M, int64_t N, int64_t K, const Matrix<TA>& a, const Matrix<TB>& b, const Finish& finish,
                Cut columns_cut, bool by_rows, int64_t threads) {
  const int64_t length = by_rows ? M : N, step = by_rows ? TILE_ROWS : PANEL, steps = (length + step - 1) / step;
  Failure no_memory;
  parallel_for(steps, (steps + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * step, count = (end == steps ? length : end * step) - first;
    const Part part = by_rows ? Part{first, count, 0, N} : Part{0, M, first, count};
    if (!gemm_by_strips<Products>(part, K, a, b, finish, columns_cut, 1)) no_memory.set();
  });
  return !no_memory.happened();
}

// C (M, N) = A B^T over threads, A (M, K), B (N, K). finish(m, n, count, sums) takes `count` neighbours of row m from
// column n: COLUMN_BLOCK of them from a multiple of it, but at the end, when they are cut in whole blocks. False when
// there was no memory.
template <class Products, class TA, class TB, class Finish>
bool gemm(int64_t M, int64_t N, int64_t K, const Matrix<TA>& a, const Matrix<TB>& b, const Finish& finish,
          Cut columns_cut = Cut::as_threads_need) {
  if (M == 0 || N == 0) return true;
  const int64_t work = M * N * K;
  if (M <= FEW_ROWS && a.depth == 1 && b.depth == 1 && K > 0) {
    const bool alone = N * K < ALONE_READ && work < ALONE;
    return gemm_few<Products>(M, N, K, a, b, finish, columns_cut, alone ? 1 : runtime.threads());
  }
  const int64_t threads = work < ALONE ? 1 : runtime.threads();
  const bool by_rows = M >= N || columns_cut == Cut::whole_blocks;
  if (threads > 1 && work < APART * threads && (by_rows ? M : N) >= SHORTEST_PART * threads) {
    return gemm_apart<Products>(M, N, K, a, b, finish, columns_cut, by_rows, threads);
  }
  // Each thread needs some blocks of rows, so that none waits for another at the end.
  if (columns_cut == Cut::as_threads_need && M >= 4 * threads * ROW_BLOCK && packs_less_by_rows<Products>(M, N, K)) {
    return gemm_by_rows<Products>(M, N, K, a, b, finish, threads);
  }
  return gemm_by_strips<Products>(Part{0, M, 0, N}, K, a, b, finish, columns_cut, threads);
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
