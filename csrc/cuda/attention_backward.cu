// attention, backward, deterministic and without atomics (Dao, FlashAttention-2, 2023, algorithm 2).
//
// A block has keys and walks over the queries that see them, of all heads that share them: 5 products. dk and dv stay
// in its registers. dq is a sum over blocks of keys, in float32 in scratch memory: 8 D bytes read and written for every
// query and block of 128 keys (2.1 GB for 32 heads of 4096 causal positions at D = 128, where all tensors together are
// 0.3 GB), of which the second cache keeps what blocks that follow one another hand on. Without that sum it takes two
// kernels and 7 products.
//
// Blocks add to dq in the order of their keys, so that the bits are always the same: a counter for each tile of queries
// says whose turn it is. The first only writes, the last writes the rounded result, and what is read is where a block's
// own product starts from. A block waits for blocks of lower index only, which GPUs start first; heads are the fastest
// index, so that of the blocks that run together as few as possible wait for each other. What a block has written it
// hands on half a turn later, when it has long arrived.
//
// Scores are kept transposed, so that the weights feed dv's product from registers, and their gradients dk's; the
// gradients also go through shared memory, as 8 x 8 matrices that ldmatrix turns, to be dq's left operand. A warp has
// 32 x 32 of dq, the same of every tile: each lane writes and reads its own accumulators, 16 bytes at a time.
//
// At D = 128 the sums dk and dv of 32 keys, which each ldmatrix must feed for shared memory to keep up with the tensor
// cores, fill a warp's registers: two warps share the keys, each with half of the queries' scores and half of the sums'
// columns, and hand each other their weights and gradients by shared memory. Where a multiprocessor's shared memory is
// too small for that, a warp has 16 keys and shared memory is what bounds it.
//
// The sums and scores leave few registers for anything else: addresses are made anew in each turn, lse and delta are
// read where they are used. So a turn touches no local memory but, for sm_90 at D = 64, four times in 320 products.
#include "attention.cuh"

namespace llmcore::cuda {

constexpr int SLICE = 32;      // queries of a warp's scores, and rows and columns of its dq
constexpr int LARGEST_Q = 64;  // queries of a tile at most: scratch memory holds whole ones

// Tiles of block_q queries and block_k keys.
struct BackwardProblem {
  AttentionBackward op;
  int64_t padded;               // T, rounded up to whole tiles
  float* dq;                    // (B, H, padded, D): sums of tiles, in the order of a block's accumulators
  float2* rows;                 // (B, H, padded): lse in base 2, and delta
  unsigned* arrivals;           // (B, H, padded / block_q): blocks of keys whose part is in
  int block_q, block_k, tiles;  // tiles: of a head
};

// The blocks of `size` keys that add to the dq of rows [first_row, last_row] are those of the keys [low, end), the one
// of `low` included; none where first > last.
struct Parts {
  int low, end;

  __device__ Parts(const Keys& keys, int first_row, int last_row) {
    low = keys.offset + first_row - keys.left;
    low = low > 0 ? low : 0;
    end = keys.offset + last_row + keys.right + 1;
    end = end < keys.length ? end : keys.length;
  }
  __device__ int first(int size) const { return low / size; }
  __device__ int last(int size) const { return end > 0 ? (end - 1) / size : -1; }
};

// Before: delta, each row's dout . out, beside its lse; no part of dq has arrived, and rows without any are zeros.
// As many lanes as a row has pieces, for 4 rows.
template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32) attention_backward_rows_kernel(const BackwardProblem whole) {
  constexpr int LANES = Tile<D>::PIECES, ROWS = 4;
  const AttentionBackward& op = whole.op;
  const AttentionProblem& p = op.problem;
  const int piece = threadIdx.x % LANES;
  const int64_t first = (int64_t(blockIdx.x) * (WARPS * 32 / LANES) + threadIdx.x / LANES) * ROWS;
  const int64_t head = first / whole.padded, b = head / p.H, h = head % p.H;
  const int t = int(first % whole.padded);
  const T* out = static_cast<const T*>(op.out) + b * op.out_strides[0] + h * op.out_strides[1] + piece * 8;
  const T* dout = static_cast<const T*>(op.dout) + b * op.dout_strides[0] + h * op.dout_strides[1] + piece * 8;
  float sums[ROWS] = {};
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    if (t + row >= p.T) continue;
    const Vector<T> x = load_vector(out + (t + row) * op.out_strides[2]);
    const Vector<T> y = load_vector(dout + (t + row) * op.dout_strides[2]);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[row] += widen(x.values[i]) * widen(y.values[i]);
  }
  float own = 0.0f;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], offset);
    if (piece == row) own = sums[row];
  }

  if (piece < ROWS) {
    // The weights of a row that sees nothing, or is behind the last, are 0.
    float2 values{INFINITY, 0.0f};
    if (t + piece < p.T) {
      const int64_t row = head * p.T + t + piece;
      const float lse = op.lse[row];
      // The gradient of a row's lse reaches its scores as -delta does.
      values = {lse == -INFINITY ? INFINITY : lse * LOG2E, own - (op.dlse == nullptr ? 0.0f : op.dlse[row])};
    }
    whole.rows[first + piece] = values;
  }
  const int tile = t / whole.block_q * whole.block_q;
  if (t == tile && piece == 0) whole.arrivals[first / whole.block_q] = 0;
  const int last = int(tile + whole.block_q < p.T ? tile + whole.block_q : p.T) - 1;
  const Parts parts(Keys(p, b), tile, last);
  if (parts.first(whole.block_k) <= parts.last(whole.block_k)) return;
  T* dq = static_cast<T*>(op.dq) + b * op.dq_strides[0] + h * op.dq_strides[1] + piece * 8;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    if (t + row < p.T) store_vector(dq + (t + row) * op.dq_strides[2], Vector<T>{});
  }
}

// Scores s and products dp = v dout^T of a tile, keys by queries, become weights and the scores' gradients, but for
// the scale. `rows`, in shared memory: those of the tile's queries, read twice rather than kept.
template <int M, int N>
__device__ void weights_and_gradients(float (&s)[M][N][4], float (&dp)[M][N][4], const Scores& scores, const Keys& keys,
                                      bool masked, int row, int first_key, int lane, const float2* rows) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float4 two = *reinterpret_cast<const float4*>(rows + 8 * n + 2 * (lane % 4));
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[m][n][i] -= i % 2 == 0 ? two.y : two.w;
    }
  }
  if (scores.softcap > 0.0f) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float tanh = scores.tanh_of(s[m][n][i]);
          s[m][n][i] = scores.softcap * tanh;
          dp[m][n][i] *= 1.0f - tanh * tanh;
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float4 two = *reinterpret_cast<const float4*>(rows + 8 * n + 2 * (lane % 4));
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] = exp2_approximately(fmaf(s[m][n][i], scores.factor, -(i % 2 == 0 ? two.x : two.z)));
        dp[m][n][i] *= s[m][n][i];
      }
    }
  }
  if (!masked) return;
  mask_outside<true>(s, keys, row, first_key, 0.0f, lane, dp);
}

// --- dq: who adds when ---

__device__ inline unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ inline void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// This lane's accumulators of a tile: 16 bytes of every 512. Past the first cache, which knows nothing of other blocks.
template <int M, int N>
__device__ void load_part(float (&c)[M][N][4], const float* from) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(c[m][n][0]), "=f"(c[m][n][1]), "=f"(c[m][n][2]), "=f"(c[m][n][3])
                   : "l"(from + (m * N + n) * 128)
                   : "memory");
    }
  }
}
template <int M, int N>
__device__ void store_part(float* to, const float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      store_vector(to + (m * N + n) * 128, Vector<float>{c[m][n][0], c[m][n][1], c[m][n][2], c[m][n][3]});
    }
  }
}

// Word k of the four lanes of a quad to its lane k, in the lanes' order.
__device__ inline void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[k] : words[k + bit], bit);
      (upper ? words[k] : words[k + bit]) = got;
    }
  }
}

// A warp's 32 columns of rows below `valid`, times the scale and rounded, 16 bytes a lane.
template <typename T, int M>
__device__ void write_rows(T* to, int64_t stride, int valid, const float (&c)[M][SLICE / 8][4], float scale, int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<T> v;
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) words[n] = pack<T>(c[m][n][2 * half] * scale, c[m][n][2 * half + 1] * scale);
      transpose_quad(words, lane);
      *reinterpret_cast<uint4*>(&v) = {words[0], words[1], words[2], words[3]};
      const int row = 16 * m + 8 * half + lane / 4;
      if (row < valid) store_vector(to + row * stride + lane % 4 * 8, v);
    }
  }
}

// The same in all lanes of a warp: by this the compiler knows it, and keeps it in a register for all.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// This block's sequence, and this thread, read anew wherever they are asked for: addresses made of them are not kept
// throughout a loop whose sums leave no registers for them.
__device__ inline int this_sequence() {
  int b;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(b));
  return b;
}
__device__ inline int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// SMALL, for D = 128: 16 keys a warp. SIDES warps share keys.
template <int D, bool SMALL>
struct BackwardShape {
  static constexpr int M = SMALL ? 1 : 2, SIDES = D == 128 && !SMALL ? 2 : 1, BLOCK_K = WARPS * 16 * M;
  static constexpr int THREADS = SIDES * WARPS * 32, COLUMNS = D / SLICE;  // warps beside each other in dq
  static constexpr int BLOCK_Q = SLICE * SIDES * WARPS / COLUMNS, SLICES = BLOCK_Q / SLICE / SIDES;
  static constexpr int N = SLICE / 8, C = D / SIDES / 8, STAGES = 2;
  static constexpr int KEYS_BYTES = BLOCK_K * D * 2, TILE_BYTES = BLOCK_Q * D * 2, ROWS_BYTES = BLOCK_Q * 8;
  static constexpr int STAGE_BYTES = 2 * TILE_BYTES + ROWS_BYTES;
  // Gradients, and weights where another side needs them: fragments of 16 keys and 16 queries, key by key.
  static constexpr int FRAGMENT_BYTES = 512, ACROSS = BLOCK_Q / 16, SCORES_BYTES = BLOCK_K * BLOCK_Q * 2;
  static constexpr int SHARED_BYTES = 2 * KEYS_BYTES + STAGES * STAGE_BYTES + SIDES * SCORES_BYTES;
};

template <typename T, int D, bool SMALL>
__global__ void __launch_bounds__(BackwardShape<D, SMALL>::THREADS)
    attention_backward_kernel(const BackwardProblem whole) {
  using Shape = BackwardShape<D, SMALL>;
  constexpr int M = Shape::M, N = Shape::N, C = Shape::C, BLOCK_K = Shape::BLOCK_K, BLOCK_Q = Shape::BLOCK_Q;
  constexpr int SIDES = Shape::SIDES, FRAGMENT = Shape::FRAGMENT_BYTES, STEPS = SLICE / 16;
  const AttentionBackward& op = whole.op;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(256) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, of_block = uniform(thread / 32);
  const int warp = of_block % WARPS, side = of_block / WARPS;
  const int64_t b = blockIdx.z, g = blockIdx.x;
  const int share = int(p.H / p.G);
  const int block = int(blockIdx.y), first_key = block * BLOCK_K;
  const int valid_keys = int(p.S - first_key < BLOCK_K ? p.S - first_key : BLOCK_K);
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Shape::KEYS_BYTES;
  const uint32_t stages = v_tile + Shape::KEYS_BYTES, gradients_at = stages + Shape::STAGES * Shape::STAGE_BYTES;

  Keys keys(p, b);
  keys.offset = uniform(keys.offset), keys.length = uniform(keys.length);
  const Scores scores(p);
  // Queries [from, to) see a key of this block.
  int from = first_key - keys.offset - keys.right, to = first_key + BLOCK_K + keys.left - keys.offset;
  from = from > 0 ? from : 0;
  to = first_key >= keys.length ? 0 : to < p.T ? to : int(p.T);
  const int first_query = from / BLOCK_Q * BLOCK_Q, tiles = to > from ? (to - first_query + BLOCK_Q - 1) / BLOCK_Q : 0;
  const int last_query = first_query + (tiles - 1) * BLOCK_Q;
  // Of a turn: its head, of those that share these keys, its first query, and where that comes to.
  int head = tiles > 0 ? 0 : share, query = first_query, stage_at = 0;
  const auto head_at = [&](int of_head) { return int(blockIdx.x) * share + of_head; };
  const auto tile_at = [&](int of_head, int t) {
    return (this_sequence() * int(p.H) + head_at(of_head)) * whole.tiles + t / BLOCK_Q;
  };
  const auto fetch = [&](int of_head, int t, int stage_at) {
    const int64_t b = this_sequence(), h = head_at(of_head);
    const int thread = this_thread();
    const int valid = int(p.T - t < BLOCK_Q ? p.T - t : BLOCK_Q);
    const uint32_t stage = stages + stage_at;
    const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] + h * p.q_strides[1] + t * p.q_strides[2];
    const T* dout =
        static_cast<const T*>(op.dout) + b * op.dout_strides[0] + h * op.dout_strides[1] + t * op.dout_strides[2];
    Tile<D>::template copy<BLOCK_Q, Shape::THREADS>(stage, q, p.q_strides[2], valid, thread);
    Tile<D>::template copy<BLOCK_Q, Shape::THREADS>(stage + Shape::TILE_BYTES, dout, op.dout_strides[2], valid, thread);
    if (thread < Shape::ROWS_BYTES / 16) {
      const float2* rows = whole.rows + int64_t(tile_at(of_head, t)) * BLOCK_Q;
      copy_async(stage + 2 * Shape::TILE_BYTES + thread * 16, rows + 2 * thread, true);
    }
  };

  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + g * p.k_strides[1] + first_key * p.k_strides[2];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + g * p.v_strides[1] + first_key * p.v_strides[2];
  Tile<D>::template copy<BLOCK_K, Shape::THREADS>(k_tile, k, p.k_strides[2], keys.length - first_key, thread);
  Tile<D>::template copy<BLOCK_K, Shape::THREADS>(v_tile, v, p.v_strides[2], keys.length - first_key, thread);
  if (tiles > 0) fetch(0, first_query, 0);
  commit_copies();

  const int own = 16 * M * warp;
  const uint32_t own_scores = gradients_at + (warp * M * Shape::ACROSS) * FRAGMENT;
  const auto parts_of = [&](int t) { return Parts(keys, t, int(t + BLOCK_Q < p.T ? t + BLOCK_Q : p.T) - 1); };
  const auto hand_on = [&](int of_head, int t) {
    const Parts parts = parts_of(t);
    if (parts.end > first_key + BLOCK_K) {
      store_release(whole.arrivals + tile_at(of_head, t), unsigned(block - parts.first(BLOCK_K) + 1));
    }
  };

  float dk[M][C][4] = {}, dv[M][C][4] = {};
  while (head < share) {
    wait_copies<0>();
    __syncthreads();  // this turn's queries are there, and no warp is at the last one's any more
    const uint32_t q_tile = stages + stage_at;  // dout's is TILE_BYTES on
    const float2* rows =
        reinterpret_cast<const float2*>(shared + (q_tile - k_tile) + 2 * Shape::TILE_BYTES) + side * SLICE;
    stage_at = Shape::STAGE_BYTES - stage_at;
    const int next_head = head + (query == last_query),
              next_query = query == last_query ? first_query : query + BLOCK_Q;
    if (next_head < share) fetch(next_head, next_query, stage_at);
    commit_copies();

    const uint32_t q_columns = left_base<D>(q_tile, lane) + uint32_t(side * C * 16);
    uint32_t weights[STEPS][M][4], gradients[STEPS][M][4];
    const auto add = [&](int row) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const uint32_t down_to = q_columns + rows_down<D>(row);
        multiply_step<T, D>(dv, weights[step], down_to, rows_down<D>(16 * step) + Shape::TILE_BYTES);
        multiply_step<T, D>(dk, gradients[step], down_to, rows_down<D>(16 * step));
      }
    };
#pragma unroll
    for (int slice = 0; slice < Shape::SLICES; ++slice) {
      // With two sides there is one slice for each.
      const int row = slice * SLICE + side * SLICE;
      const uint32_t k_base = left_base<D>(k_tile + rows_down<D>(own), lane);
      const uint32_t q_rows = right_base<D>(q_tile, lane) + rows_down<D>(row);
      float s[M][N][4] = {}, dp[M][N][4] = {};
      multiply_rows<T, D>(s, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, k_base, step); }, q_rows);
      multiply_rows<T, D>(
          dp, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, k_base, step, Shape::KEYS_BYTES); }, q_rows,
          Shape::TILE_BYTES);
      const int last = query + BLOCK_Q <= p.T ? query + BLOCK_Q - 1 : int(p.T) - 1;
      const bool masked = first_key < keys.low(last) || first_key + BLOCK_K > keys.high(query);
      weights_and_gradients(s, dp, scores, keys, masked, query + row, first_key + own, lane, rows + slice * SLICE);
      const uint32_t place = own_scores + row / 16 * FRAGMENT + lane * 4;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          pack_left<T>(weights[step][m], s[m][2 * step], s[m][2 * step + 1]);
          pack_left<T>(gradients[step][m], dp[m][2 * step], dp[m][2 * step + 1]);
          const uint32_t fragment = place + (m * Shape::ACROSS + step) * FRAGMENT;
          store_matrices(fragment, gradients[step][m]);
          if (SIDES > 1) store_matrices(fragment + Shape::SCORES_BYTES, weights[step][m]);
        }
      }
      if (slice + 1 < Shape::SLICES) add(row);
    }

    const Parts parts = parts_of(query);
    const bool adds = parts.low < first_key;
    const bool leaves = parts.end > first_key + BLOCK_K;
    if (thread == 0 && (head > 0 || query > first_query)) {
      hand_on(query == first_query ? head - 1 : head, query == first_query ? last_query : query - BLOCK_Q);
    }
    if (thread == 32 && adds) {
      while (load_acquire(whole.arrivals + tile_at(head, query)) < unsigned(block - parts.first(BLOCK_K))) {
      }
    }
    __syncthreads();  // all gradients are there, and the sum of dq's parts before this one

    const int across = of_block % Shape::COLUMNS, down = of_block / Shape::COLUMNS;  // of dq's tile
    const auto part = [&] {
      const int thread = this_thread();
      return whole.dq + int64_t(tile_at(head, query)) * (BLOCK_Q * D) + thread / 32 * (SLICE * SLICE) + thread % 32 * 4;
    };
    float dq[2][SLICE / 8][4] = {};
    if (adds) load_part(dq, part());
    add((Shape::SLICES - 1) * SLICE + side * SLICE);
    if constexpr (SIDES > 1) {
      const int row = (1 - side) * SLICE;
      const uint32_t place = own_scores + row / 16 * FRAGMENT + lane * 16;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          load_matrices(gradients[step][m], place + (m * Shape::ACROSS + step) * FRAGMENT);
          load_matrices(weights[step][m], place + (m * Shape::ACROSS + step) * FRAGMENT + Shape::SCORES_BYTES);
        }
      }
      add(row);
    }
    const uint32_t k_columns = left_base<D>(k_tile, lane) ^ uint32_t(across * SLICE * 2);
    const uint32_t place = gradients_at + down * (SLICE / 16) * FRAGMENT + lane * 16;
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_left_turned(a[m], place + (step * Shape::ACROSS + m) * FRAGMENT);
      multiply_step<T, D>(dq, a, k_columns, rows_down<D>(16 * step));
    }
    if (leaves) {
      store_part(part(), dq);
    } else {
      const int64_t b = this_sequence(), h = head_at(head);
      const int first_row = query + down * SLICE;
      T* to_rows = static_cast<T*>(op.dq) + b * op.dq_strides[0] + h * op.dq_strides[1] + first_row * op.dq_strides[2] +
                   across * SLICE;
      write_rows(to_rows, op.dq_strides[2], int(p.T) - first_row, dq, p.scale, lane);
    }
    head = next_head, query = next_query;
  }
  wait_copies<0>();
  __syncthreads();  // the tiles that are written below have arrived for all, and nobody reads them any more
  if (thread == 0 && tiles > 0) hand_on(share - 1, last_query);

  float dk_factor[M][2], dv_factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) dk_factor[m][half] = p.scale, dv_factor[m][half] = 1.0f;
  store_tile<T, D>(k_tile + rows_down<D>(own), dk, dk_factor, lane, side * C);
  store_tile<T, D>(v_tile + rows_down<D>(own), dv, dv_factor, lane, side * C);
  __syncwarp();
  T* dk_rows =
      static_cast<T*>(op.dk) + b * op.dk_strides[0] + g * op.dk_strides[1] + (first_key + own) * op.dk_strides[2];
  T* dv_rows =
      static_cast<T*>(op.dv) + b * op.dv_strides[0] + g * op.dv_strides[1] + (first_key + own) * op.dv_strides[2];
  write_tile<T, D, 16 * M, C>(k_tile + rows_down<D>(own), dk_rows, op.dk_strides[2], valid_keys - own, lane, side * C);
  write_tile<T, D, 16 * M, C>(v_tile + rows_down<D>(own), dv_rows, op.dv_strides[2], valid_keys - own, lane, side * C);
}

// --- Launch ---

struct Scratch {
  int64_t padded, rows;  // of a head, of all

  explicit Scratch(const AttentionProblem& p)
      : padded(ceil_div(p.T, LARGEST_Q) * LARGEST_Q), rows(p.B * p.H * padded) {}
  size_t dq_bytes(const AttentionProblem& p) const { return size_t(rows * p.D) * sizeof(float); }
  size_t rows_bytes() const { return size_t(rows) * sizeof(float2); }
  size_t arrivals_bytes() const { return size_t(rows / SLICE) * sizeof(unsigned); }
};

size_t attention_backward_workspace(const AttentionBackward& op) {
  const Scratch scratch(op.problem);
  return scratch.dq_bytes(op.problem) + scratch.rows_bytes() + scratch.arrivals_bytes();
}

template <typename T, int D, bool SMALL>
int launch_backward(const AttentionBackward& op, void* workspace, Stream stream) {
  using Shape = BackwardShape<D, SMALL>;
  const AttentionProblem& p = op.problem;
  const Scratch scratch(p);
  char* rows = static_cast<char*>(workspace) + scratch.dq_bytes(p);
  const BackwardProblem whole{op,
                              scratch.padded,
                              static_cast<float*>(workspace),
                              reinterpret_cast<float2*>(rows),
                              reinterpret_cast<unsigned*>(rows + scratch.rows_bytes()),
                              Shape::BLOCK_Q,
                              Shape::BLOCK_K,
                              int(scratch.padded / Shape::BLOCK_Q)};
  const dim3 per_rows(unsigned(scratch.rows / (WARPS * 32 / Tile<D>::PIECES * 4)));
  const int error = launch(attention_backward_rows_kernel<T, D>, per_rows, dim3(WARPS * 32), 0, stream, whole);
  if (error != cudaSuccess) return error;
  const dim3 per_keys(unsigned(p.G), unsigned(ceil_div(p.S, Shape::BLOCK_K)), unsigned(p.B));
  return launch(attention_backward_kernel<T, D, SMALL>, per_keys, dim3(Shape::THREADS), Shape::SHARED_BYTES, stream,
                whole);
}

// 2 dtypes x 2 widths = 4 builds of both kernels, and at D = 128 two of the second.
int attention_backward(const AttentionBackward& op, void* workspace, Stream stream) {
  const AttentionProblem& p = op.problem;
  if (!takes_tensor_cores(p)) return cudaErrorInvalidValue;
  return with_type_and_width(p, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int D = decltype(width)::value;
    if constexpr (D == 128) {
      if (shared_bytes_limit() < BackwardShape<D, false>::SHARED_BYTES) {
        return launch_backward<T, D, true>(op, workspace, stream);
      }
    }
    return launch_backward<T, D, false>(op, workspace, stream);
  });
}

}  // namespace llmcore::cuda
