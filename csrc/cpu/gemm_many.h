// Many rows, bound by multiply-adds: both operands are copied into the order in which a tile reads them, and its sums
// lie along the columns of C, so that no lanes are folded.
//
// The few rows of gemm_few.h have LANES sums for an element, which are folded in halves. The same bits come out here:
// the products that fall into one lane there are a chain here, added up one after the other; the chains come one after
// the other too, and are added in the pairs in which lanes are folded, those already there waiting in a stack. A chain
// is also the block that keeps a panel of B in the first cache while a block of rows passes.
#pragma once

#include "gemm_matrix.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int TILE_ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int PANEL_VECS = 3;
constexpr int64_t PANEL = PANEL_VECS * LANES;  // columns of a tile
constexpr int64_t ROW_BLOCK = 64;
constexpr int64_t STACK_SLOT = ROW_BLOCK * PANEL + 5 * LANES;  // slots don't meet in a set of the first cache
constexpr int CHAINS_AT_ONCE = REGISTERS == 32 ? 2 : 1;
constexpr int CHAINS_LOG2 = __builtin_ctz(LANES);
static_assert(LANES % TILE_ROWS == 0 && ROW_BLOCK % LANES == 0);

// How the inner axis is cut: into blocks, and these into chains.
struct DepthCut {
  int64_t chains, longest;  // lanes of a block
};
constexpr DepthCut AS_FEW_ROWS{LANES, DEPTH_BLOCK};
constexpr DepthCut ONE_CHAIN{1, 256};

// A block of the inner axis. A group of LANES rows of an operand is packed chain by chain, LANES words side by side for
// each step.
struct Chains {
  int64_t count, steps;
  // From one chain to the next. An odd number of cache lines: chains share no set.
  int64_t stride() const { return count == 1 ? LANES : (steps | 1) * LANES; }
  int64_t step_of_lanes() const { return count == 1 ? LANES * LANES : LANES; }  // as packed a vector at a time
  int64_t words() const { return count == 1 ? (steps + LANES - 1) / LANES * LANES * LANES : count * stride(); }
};
template <class Products>
Chains chains_of(int64_t values, const DepthCut& cut) {
  const int64_t lanes =
      cut.chains == 1 ? (values + Products::VALUES - 1) / Products::VALUES : padded_lanes<Products>(values);
  return {cut.chains, lanes / cut.chains};
}
template <class Products>
int64_t group_words(int64_t depth, const DepthCut& cut) {
  int64_t words = 0;
  for_depth_blocks<Products>(depth, cut.longest,
                             [&](int64_t, int64_t values) { words += chains_of<Products>(values, cut).words(); });
  return words;
}

// One block of up to LANES rows that lie along the inner axis.
template <class Products, class T>
void pack_along(const Matrix<T>& from, int64_t rows, int64_t values, const Chains& chains, float* to) {
  constexpr int64_t BLOCK = LANES * Products::VALUES;
  const int64_t stride = chains.stride();
  for (int64_t k = 0; k < values; k += BLOCK, to += chains.step_of_lanes()) {
    vec block[LANES];
    if (rows == LANES && values - k >= BLOCK) {
      // The rows to come are fetched, which no hardware foresees: each load here is of another row.
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) {
        block[r] = load_lanes<Products>(from.at(r, k));
        __builtin_prefetch(from.at(r + LANES, k), 0, 2);
      }
    } else {
      for (int r = 0; r < LANES; ++r) {
        block[r] = r < rows ? load_lanes_partial<Products>(from.at(r, k), values - k) : vec{};
      }
    }
    transpose(block);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) store(to + l * stride, block[l]);
  }
}

// One block of rows that lie across the inner axis, `group` words from one LANES of them to the next. What is to be
// read and where it goes are fetched: either may be in another core's cache, and that in another socket.
template <class Products, class T>
void pack_across(const Matrix<T>& from, int64_t rows, int64_t values, const Chains& chains, int64_t group, float* to) {
  constexpr int64_t AHEAD = 8;  // steps; 16 were no better
  const int64_t ahead = AHEAD * chains.count * Products::VALUES;
  int64_t k = 0;
  for (int64_t s = 0; s < chains.steps; ++s) {
    for (int64_t l = 0; l < chains.count; ++l, k += Products::VALUES) {
      float* at = to + l * chains.stride() + s * LANES;
      const T* row = from.at(0, k);
      int64_t r = 0;
      if (k + Products::VALUES <= values) {
        for (; r + LANES <= rows; r += LANES, at += group) {
          for (int v = 0; v < Products::VALUES; ++v) {
            if (k + ahead + v < values) __builtin_prefetch(row + r + (ahead + v) * from.depth, 0, 3);
          }
          __builtin_prefetch(at + AHEAD * LANES, 1, 3);
          store(at, join_values<Products>(row + r, from.depth, Products::VALUES, LANES));
        }
      }
      for (; r < rows; r += LANES, at += group) {
        store(at, k < values ? join_values<Products>(row + r, from.depth, values - k, rows - r) : vec{});
      }
    }
  }
}

// Any number of rows with the whole inner axis: group by group, in a group block by block.
template <class Products, class T>
void pack_groups(const Matrix<T>& from, int64_t rows, int64_t depth, const DepthCut& cut, int64_t group, float* to) {
  for_depth_blocks<Products>(depth, cut.longest, [&](int64_t k, int64_t values) {
    const Chains chains = chains_of<Products>(values, cut);
    const Matrix<T> block = from.from(0, k);
    if (from.depth == 1) {
      for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t here = rows - r < LANES ? rows - r : LANES;
        pack_along<Products>(block.from(r, 0), here, values, chains, to + r / LANES * group);
      }
    } else {
      constexpr int64_t AT_ONCE = 4 * LANES;  // each writes to its own page for each chain
      for (int64_t r = 0; r < rows; r += AT_ONCE) {
        const int64_t here = rows - r < AT_ONCE ? rows - r : AT_ONCE;
        pack_across<Products>(block.from(r, 0), here, values, chains, group, to + r / LANES * group);
      }
    }
    to += chains.words();
  });
}

// What a chain of a tile is added to: `merged` tiles in the stack, the upper one at `top`, rows PANEL apart, then, when
// `onto`, what is at `to`, where the sum goes.
struct ChainSum {
  const float* top;
  int merged;
  float* to;
  int64_t to_row;
  bool onto;
};

// T chains at once, `apart` words from one to the next, of R rows and V vectors of columns.
template <class Products, int T, int R, int V>
[[gnu::noinline]] void multiply_chains(const float* a, const float* b, int64_t b_group, int64_t steps, int64_t apart,
                                       const float* ahead, const ChainSum& into) {
  vec sums[T][R][V];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[t][r][v] = vec{};
  for (int64_t s = 0; s < steps; ++s, a += LANES, b += LANES, ahead += LANES) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      vec right[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) right[v] = load(b + t * apart + v * b_group);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec left = broadcast(a[t * apart + r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[t][r][v] = Products::add(sums[t][r][v], left, right[v]);
      }
    }
  }
  vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = T == 1 ? sums[0][r][v] : sums[0][r][v] + sums[T - 1][r][v];
  const float* top = into.top;
  for (int m = 0; m < into.merged; ++m, top -= STACK_SLOT) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = load(top + r * PANEL + v * LANES) + sum[r][v];
  }
  float* to = into.to;
  if (into.onto) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = load(to + r * into.to_row + v * LANES) + sum[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, to += into.to_row)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(to + v * LANES, sum[r][v]);
}

// As many of `rows` as a tile takes; how many that were.
template <class Products, int T, int V, int R = TILE_ROWS / T>
INLINE int64_t multiply_rows(int64_t rows, const float* a, const float* b, int64_t b_group, int64_t steps,
                             int64_t apart, const float* ahead, const ChainSum& into) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows<Products, T, V, R / 2>(rows, a, b, b_group, steps, apart, ahead, into);
  }
  multiply_chains<Products, T, R, V>(a, b, b_group, steps, apart, ahead, into);
  return R;
}

// The chain that is the i-th to be added: lanes are folded in halves, so it is i's bits in reverse order.
INLINE int64_t chain_at(int64_t i, int64_t count) {
  int64_t chain = 0;
  for (; count > 1; count /= 2, i /= 2) chain = 2 * chain + i % 2;
  return chain;
}

// sums (+)= a block of rows times a panel of V vectors of columns, over one block of the inner axis, T chains at once;
// done(r, end) when the rows [r, end) are there, while they are in the first cache.
template <class Products, int T, int V, class Done>
void multiply_panel(const float* a, const float* b, int64_t rows, int64_t group, const Chains& chains, float* stack,
                    float* sums, int64_t sums_row, bool onto, const Done& done) {
  const int64_t turns = chains.count / T, apart = chain_at(T - 1, chains.count) * chains.stride();
  for (int64_t i = 0; i < turns; ++i) {
    const int64_t offset = chain_at(i * T, chains.count) * chains.stride();
    const int waiting = __builtin_popcountll(uint64_t(i)), merged = __builtin_ctzll(~uint64_t(i));
    const bool last = i + 1 == turns;
    float* slot = stack + (waiting - merged) * STACK_SLOT;
    // Each tile fetches a part of what comes next.
    const int64_t next = last ? 0 : chain_at((i + 1) * T, chains.count) * chains.stride();
    const float* next_b = b + next + (last ? PANEL_VECS * group : 0);
    int64_t tile = 0;
    for (int64_t r = 0; r < rows; ++tile) {
      const int64_t part = tile / T;
      const float* ahead = (part < V ? next_b + part * group : a + next + (part - V) * group) + tile % T * apart;
      const float* left = a + r / LANES * group + r % LANES + offset;
      float* to = last ? sums + r * sums_row : slot + r * PANEL;
      const ChainSum into{stack + (waiting - 1) * STACK_SLOT + r * PANEL, merged, to, last ? sums_row : PANEL,
                          last && onto};
      const int64_t first = r;
      r += multiply_rows<Products, T, V>(rows - r, left, b + offset, group, chains.steps, apart, ahead, into);
      if (last) done(first, r);
    }
  }
}

// sums = a block of rows times a strip of columns, or += when `onto`; done(r, end, c, count) when rows [r, end) of
// `count` columns are there. Whole vectors are written. One chain needs no stack.
template <class Products, class Done>
void multiply_strip(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, const DepthCut& cut,
                    int64_t group, float* stack, float* sums, int64_t sums_row, const Done& done, bool onto = false) {
  if (depth == 0) {
    if (!onto) std::memset(sums, 0, size_t(rows * sums_row) * sizeof(float));
    return done(0, rows, 0, columns);
  }
  for_depth_blocks<Products>(depth, cut.longest, [&](int64_t k, int64_t values) {
    const Chains chains = chains_of<Products>(values, cut);
    for (int64_t c = 0; c < columns; c += PANEL) {
      const int64_t count = columns - c < PANEL ? columns - c : PANEL;
      const auto multiply = [&](auto vecs) {
        constexpr int V = decltype(vecs)::value;
        const float* panel = b + c / LANES * group;
        const auto done_here = [&](int64_t r, int64_t end) {
          if (k + values == depth) done(r, end, c, count);
        };
        if (chains.count == 1) {
          multiply_panel<Products, 1, V>(a, panel, rows, group, chains, stack, sums + c, sums_row, onto || k > 0,
                                         done_here);
        } else {
          multiply_panel<Products, CHAINS_AT_ONCE, V>(a, panel, rows, group, chains, stack, sums + c, sums_row,
                                                      onto || k > 0, done_here);
        }
      };
      if (count > 2 * LANES) {
        multiply(std::integral_constant<int, 3>{});
      } else if (count > LANES) {
        multiply(std::integral_constant<int, 2>{});
      } else {
        multiply(std::integral_constant<int, 1>{});
      }
    }
    a += chains.words(), b += chains.words();
  });
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
