// attention, backward, deterministic and without atomics (Dao, FlashAttention-2, 2023, section 3.1.2, in two passes).
//
// First delta, each row's dout . out; then a pass in which a block has keys and walks over the queries that see them,
// of all heads that share them (dk, dv), and one in which a block has queries and walks over keys (dq). Both compute
// scores and weights anew from lse: 7 products, where a single pass would do 5 and sum dq over the blocks of keys. That
// sum is what costs the bits their order: each block would add its part to dq in float32, 8 D bytes read and written
// for every query and block of 128 keys (2.1 GB for 32 heads of 4096 causal positions at D = 128, where all tensors
// together are 0.3 GB), and for the same bits each time it would wait at every query for the block before it. Here no
// block waits for another, and nothing but the result is written.
//
// In the first pass scores are kept transposed, so that in both the weights feed the next product from registers.
// At D = 128 the sums dk and dv of 32 keys, which each ldmatrix must feed for shared memory to keep up with the tensor
// cores, fill a warp's registers: two warps share the keys, each with half of the queries' scores and half of the sums'
// columns, and hand each other their weights by shared memory, as the fragments that they are. Where a multiprocessor's
// shared memory is too small for that, a warp has 16 keys and shared memory is what bounds it.
#include "attention.cuh"

namespace llmcore::cuda {

struct BackwardProblem {
  AttentionBackward op;
  float* delta;  // (B, H, T)
};

// A warp for each row.
template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32) attention_delta_kernel(const BackwardProblem whole) {
  const AttentionBackward& op = whole.op;
  const AttentionProblem& p = op.problem;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= p.B * p.H * p.T) return;
  const int64_t t = row % p.T, h = row / p.T % p.H, b = row / p.T / p.H;
  const T* out = static_cast<const T*>(op.out) + b * op.out_strides[0] + h * op.out_strides[1] + t * op.out_strides[2];
  const T* dout =
      static_cast<const T*>(op.dout) + b * op.dout_strides[0] + h * op.dout_strides[1] + t * op.dout_strides[2];
  float sum = 0.0f;
  if (lane < Tile<D>::PIECES) {
    const Vector<T> x = load_vector(out + lane * 8), y = load_vector(dout + lane * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += widen(x.values[i]) * widen(y.values[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  // The gradient of a row's lse reaches its scores as -delta does.
  if (lane == 0) whole.delta[row] = sum - (op.dlse == nullptr ? 0.0f : op.dlse[row]);
}

// Scores s and products dp = dout v^T of a tile become weights and the scores' gradients, but for the scale.
// lse(m, n, i) and delta(m, n, i) are those of an element's row.
template <bool TRANSPOSED, int M, int N, typename Lse, typename Delta>
__device__ void weights_and_gradients(float (&s)[M][N][4], float (&dp)[M][N][4], const Scores& scores, const Keys& keys,
                                      bool masked, int64_t row, int first_key, int lane, Lse lse, Delta delta) {
  scores.cap(s);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = s[m][n][i];
        const float weight = exp2_approximately(fmaf(score, scores.factor, -lse(m, n, i) * LOG2E));
        float gradient = weight * (dp[m][n][i] - delta(m, n, i));
        if (scores.softcap > 0.0f) gradient *= 1.0f - (score / scores.softcap) * (score / scores.softcap);
        s[m][n][i] = weight;
        dp[m][n][i] = gradient;
      }
    }
  }
  if (!masked) return;
  mask_outside<TRANSPOSED>(s, keys, row, first_key, 0.0f, lane);
  mask_outside<TRANSPOSED>(dp, keys, row, first_key, 0.0f, lane);
}

// SIDES warps share keys.
template <int D, int SIDES>
struct KeysShape {
  static constexpr int M = D == 64 * SIDES ? 2 : 1, BLOCK_K = WARPS * 16 * M, THREADS = SIDES * WARPS * 32;
  static constexpr int SIDE_Q = 32, BLOCK_Q = SIDES * SIDE_Q, N = SIDE_Q / 8, C = D / SIDES / 8, STAGES = 2;
  static constexpr int KEYS_BYTES = BLOCK_K * D * 2, TILE_BYTES = BLOCK_Q * D * 2, STAGE_BYTES = 2 * TILE_BYTES;
  static constexpr int ROWS_BYTES = BLOCK_Q * 4;                  // lse or delta
  static constexpr int FRAGMENTS = N / 2 * M, PIECE_BYTES = 512;  // of weights or gradients; one of a warp
  static constexpr int EXCHANGE_BYTES = SIDES == 1 ? 0 : SIDES * WARPS * 2 * FRAGMENTS * PIECE_BYTES;
  static constexpr int SHARED_BYTES = 2 * KEYS_BYTES + STAGES * (STAGE_BYTES + 2 * ROWS_BYTES) + EXCHANGE_BYTES;
};

template <typename T, int D, int SIDES>
__global__ void __launch_bounds__(KeysShape<D, SIDES>::THREADS)
    attention_backward_keys_kernel(const BackwardProblem whole) {
  using Shape = KeysShape<D, SIDES>;
  constexpr int M = Shape::M, N = Shape::N, C = Shape::C, BLOCK_K = Shape::BLOCK_K, BLOCK_Q = Shape::BLOCK_Q;
  const AttentionBackward& op = whole.op;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % WARPS, side = thread / (32 * WARPS);
  const int64_t b = blockIdx.z, g = blockIdx.y, share = p.H / p.G;
  const int first_key = int(blockIdx.x) * BLOCK_K, rows = int(p.S - first_key < BLOCK_K ? p.S - first_key : BLOCK_K);
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Shape::KEYS_BYTES;
  const uint32_t stages = v_tile + Shape::KEYS_BYTES, row_stages = stages + Shape::STAGES * Shape::STAGE_BYTES;
  const float* row_values = reinterpret_cast<const float*>(shared + (row_stages - k_tile));

  const Keys keys(p, b);
  const Scores scores(p);
  // Queries [from, to) see a key of this block.
  int from = first_key - keys.offset - keys.right, to = first_key + BLOCK_K + keys.left - keys.offset;
  from = from > 0 ? from : 0;
  to = first_key >= keys.length ? 0 : to < p.T ? to : int(p.T);
  const int first_block = from / BLOCK_Q, blocks = to > from ? (to + BLOCK_Q - 1) / BLOCK_Q - first_block : 0;
  const int turns = blocks * int(share);
  // The next turn to fetch: its head, of those that share these keys, and first query.
  int next_head = 0, next_query = first_block * BLOCK_Q;
  const auto fetch = [&](int turn) {
    const int64_t h = g * share + next_head;
    const int t = next_query;
    const int valid = int(p.T - t < BLOCK_Q ? p.T - t : BLOCK_Q);
    const uint32_t stage = stages + turn % Shape::STAGES * Shape::STAGE_BYTES;
    const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] + h * p.q_strides[1] + t * p.q_strides[2];
    const T* dout =
        static_cast<const T*>(op.dout) + b * op.dout_strides[0] + h * op.dout_strides[1] + t * op.dout_strides[2];
    Tile<D>::template copy<BLOCK_Q>(stage, q, p.q_strides[2], valid, thread, Shape::THREADS);
    Tile<D>::template copy<BLOCK_Q>(stage + Shape::TILE_BYTES, dout, op.dout_strides[2], valid, thread, Shape::THREADS);
    if (thread < 2 * BLOCK_Q) {
      const int row = thread % BLOCK_Q;
      const float* values = (thread < BLOCK_Q ? op.lse : whole.delta) + (b * p.H + h) * p.T + t;
      copy_float_async(row_stages + turn % Shape::STAGES * 2 * Shape::ROWS_BYTES + thread * 4, values + row,
                       row < valid);
    }
    next_query += BLOCK_Q;
    if (next_query == (first_block + blocks) * BLOCK_Q) next_head += 1, next_query = first_block * BLOCK_Q;
  };

  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + g * p.k_strides[1] + first_key * p.k_strides[2];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + g * p.v_strides[1] + first_key * p.v_strides[2];
  Tile<D>::template copy<BLOCK_K>(k_tile, k, p.k_strides[2], keys.length - first_key, thread, Shape::THREADS);
  Tile<D>::template copy<BLOCK_K>(v_tile, v, p.v_strides[2], keys.length - first_key, thread, Shape::THREADS);
  int query = next_query;
  if (turns > 0) fetch(0);
  commit_copies();
  const int own = 16 * M * warp;
  const uint32_t k_base = left_base<D>(k_tile + rows_down<D>(own), lane);
  // Fragments that go to the other side, and those that come from there: weights, then gradients.
  const uint32_t exchange = row_stages + Shape::STAGES * 2 * Shape::ROWS_BYTES + lane * 16;
  const auto fragments_of = [&](int of_side) {
    return exchange + (of_side * WARPS + warp) * 2 * Shape::FRAGMENTS * Shape::PIECE_BYTES;
  };

  float dk[M][C][4] = {}, dv[M][C][4] = {};
  for (int turn = 0; turn < turns; ++turn) {
    const int t = query;
    wait_copies<0>();
    __syncthreads();  // this turn's queries are there, and no warp reads the last one's any more
    query = next_query;
    if (turn + 1 < turns) fetch(turn + 1);
    commit_copies();
    const uint32_t q_tile = stages + turn % Shape::STAGES * Shape::STAGE_BYTES;  // dout's is TILE_BYTES on
    const float* lse = row_values + turn % Shape::STAGES * 2 * BLOCK_Q + side * Shape::SIDE_Q;
    const uint32_t q_rows = right_base<D>(q_tile, lane) + rows_down<D>(side * Shape::SIDE_Q);
    float s[M][N][4] = {}, dp[M][N][4] = {};
    multiply_rows<T, D>(s, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, k_base, step); }, q_rows);
    multiply_rows<T, D>(
        dp, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, k_base, step, Shape::KEYS_BYTES); }, q_rows,
        Shape::TILE_BYTES);
    const int last = t + BLOCK_Q <= p.T ? t + BLOCK_Q - 1 : int(p.T) - 1;
    const bool masked = first_key < keys.low(last) || first_key + BLOCK_K > keys.high(t);
    const auto column = [&](int n, int i) { return 8 * n + 2 * (lane % 4) + i % 2; };
    weights_and_gradients<true>(
        s, dp, scores, keys, masked, t + side * Shape::SIDE_Q, first_key + own, lane,
        [&](int, int n, int i) { return lse[column(n, i)]; },
        [&](int, int n, int i) { return lse[BLOCK_Q + column(n, i)]; });

    const uint32_t q_columns = left_base<D>(q_tile, lane) + uint32_t(side * C * 16);
    const uint32_t to_other = fragments_of(side), from_other = fragments_of(1 - side);
    const auto add = [&](int of_side, int step, const uint32_t (&weights)[M][4], const uint32_t (&gradients)[M][4]) {
      const uint32_t rows = q_columns + rows_down<D>(of_side * Shape::SIDE_Q);
      multiply_step<T, D>(dv, weights, rows, rows_down<D>(16 * step) + Shape::TILE_BYTES);
      multiply_step<T, D>(dk, gradients, rows, rows_down<D>(16 * step));
    };
#pragma unroll
    for (int step = 0; step < N / 2; ++step) {
      uint32_t weights[M][4], gradients[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        pack_left<T>(weights[m], s[m][2 * step], s[m][2 * step + 1]);
        pack_left<T>(gradients[m], dp[m][2 * step], dp[m][2 * step + 1]);
        if constexpr (SIDES > 1) {
          store_pieces(to_other + (step * M + m) * Shape::PIECE_BYTES, weights[m]);
          store_pieces(to_other + (Shape::FRAGMENTS + step * M + m) * Shape::PIECE_BYTES, gradients[m]);
        }
      }
      add(side, step, weights, gradients);
    }
    if constexpr (SIDES > 1) {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + warp), "n"(SIDES * 32) : "memory");
#pragma unroll
      for (int step = 0; step < N / 2; ++step) {
        uint32_t weights[M][4], gradients[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          load_pieces(weights[m], from_other + (step * M + m) * Shape::PIECE_BYTES);
          load_pieces(gradients[m], from_other + (Shape::FRAGMENTS + step * M + m) * Shape::PIECE_BYTES);
        }
        add(1 - side, step, weights, gradients);
      }
    }
  }
  wait_copies<0>();
  // The tiles that are written below have arrived for all, and no other side reads them any more.
  if (turns == 0 || SIDES > 1) __syncthreads();

  float dk_factor[M][2], dv_factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) dk_factor[m][half] = p.scale, dv_factor[m][half] = 1.0f;
  __syncwarp();
  store_tile<T, D>(k_tile + rows_down<D>(own), dk, dk_factor, lane, side * C);
  store_tile<T, D>(v_tile + rows_down<D>(own), dv, dv_factor, lane, side * C);
  __syncwarp();
  T* dk_rows =
      static_cast<T*>(op.dk) + b * op.dk_strides[0] + g * op.dk_strides[1] + (first_key + own) * op.dk_strides[2];
  T* dv_rows =
      static_cast<T*>(op.dv) + b * op.dv_strides[0] + g * op.dv_strides[1] + (first_key + own) * op.dv_strides[2];
  write_tile<T, D, 16 * M, C>(k_tile + rows_down<D>(own), dk_rows, op.dk_strides[2], rows - own, lane, side * C);
  write_tile<T, D, 16 * M, C>(v_tile + rows_down<D>(own), dv_rows, op.dv_strides[2], rows - own, lane, side * C);
}

template <int D>
struct QueriesShape {
  static constexpr int M = 2, BLOCK_M = WARPS * 16 * M, BLOCK_N = 32, N = BLOCK_N / 8, STAGES = 2;
  static constexpr int QUERIES_BYTES = BLOCK_M * D * 2, TILE_BYTES = BLOCK_N * D * 2, STAGE_BYTES = 2 * TILE_BYTES;
  static constexpr int ROWS_BYTES = 2 * BLOCK_M * 4;  // lse and delta, for which there is no register at D = 128
  static constexpr int SHARED_BYTES = 2 * QUERIES_BYTES + STAGES * STAGE_BYTES + ROWS_BYTES;
};

template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32) attention_backward_queries_kernel(const BackwardProblem whole) {
  using Shape = QueriesShape<D>;
  constexpr int M = Shape::M, N = Shape::N, BLOCK_M = Shape::BLOCK_M, BLOCK_N = Shape::BLOCK_N;
  const AttentionBackward& op = whole.op;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t b = blockIdx.z, h = blockIdx.y, g = h / (p.H / p.G);
  const int64_t first_row = int64_t(gridDim.x - 1 - blockIdx.x) * BLOCK_M;
  const int rows = int(p.T - first_row < BLOCK_M ? p.T - first_row : BLOCK_M);
  const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] + h * p.q_strides[1] + first_row * p.q_strides[2];
  const T* dout =
      static_cast<const T*>(op.dout) + b * op.dout_strides[0] + h * op.dout_strides[1] + first_row * op.dout_strides[2];
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + g * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + g * p.v_strides[1];
  const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + Shape::QUERIES_BYTES;
  const uint32_t stages = dout_tile + Shape::QUERIES_BYTES;
  constexpr int ROWS_START = Shape::SHARED_BYTES - Shape::ROWS_BYTES;

  const Keys keys(p, b);
  const Scores scores(p);
  const KeyBlocks blocks(keys, first_row, first_row + rows - 1, BLOCK_N);
  const auto fetch = [&](int block) {
    const int key = block * BLOCK_N;
    const uint32_t stage = stages + block % Shape::STAGES * Shape::STAGE_BYTES;
    Tile<D>::template copy<BLOCK_N>(stage, k + key * p.k_strides[2], p.k_strides[2], keys.length - key, thread,
                                    WARPS * 32);
    Tile<D>::template copy<BLOCK_N>(stage + Shape::TILE_BYTES, v + key * p.v_strides[2], p.v_strides[2],
                                    keys.length - key, thread, WARPS * 32);
  };
  Tile<D>::template copy<BLOCK_M>(q_tile, q, p.q_strides[2], rows, thread, WARPS * 32);
  Tile<D>::template copy<BLOCK_M>(dout_tile, dout, op.dout_strides[2], rows, thread, WARPS * 32);
  for (int i = thread; i < 2 * BLOCK_M; i += WARPS * 32) {
    const float* values = (i < BLOCK_M ? op.lse : whole.delta) + (b * p.H + h) * p.T + first_row;
    copy_float_async(q_tile + ROWS_START + i * 4, values + i % BLOCK_M, i % BLOCK_M < rows);
  }
  if (blocks.first < blocks.end) fetch(blocks.first);
  commit_copies();
  const int own = 16 * M * warp;
  const float* own_lse = reinterpret_cast<const float*>(shared + ROWS_START) + own + lane / 4;
  const uint32_t q_base = left_base<D>(q_tile + rows_down<D>(own), lane);

  float dq[M][D / 8][4] = {};
  for (int block = blocks.first; block < blocks.end; ++block) {
    wait_copies<0>();
    __syncthreads();
    if (block + 1 < blocks.end) fetch(block + 1);
    commit_copies();
    const uint32_t k_tile = stages + block % Shape::STAGES * Shape::STAGE_BYTES;  // v's is TILE_BYTES on
    const uint32_t k_rows = right_base<D>(k_tile, lane);
    float s[M][N][4] = {}, dp[M][N][4] = {};
    multiply_rows<T, D>(s, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, q_base, step); }, k_rows);
    multiply_rows<T, D>(
        dp, [&](uint32_t (&a)[M][4], int step) { load_left<D>(a, q_base, step, Shape::QUERIES_BYTES); }, k_rows,
        Shape::TILE_BYTES);
    weights_and_gradients<false>(
        s, dp, scores, keys, blocks.cuts(block), first_row + own, block * BLOCK_N, lane,
        [&](int m, int, int i) { return own_lse[16 * m + 8 * (i / 2)]; },
        [&](int m, int, int i) { return own_lse[BLOCK_M + 16 * m + 8 * (i / 2)]; });
    multiply_columns<T, D>(dq, dp, left_base<D>(k_tile, lane));
  }
  wait_copies<0>();
  if (blocks.first >= blocks.end) __syncthreads();
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[m][half] = p.scale;
  __syncwarp();
  store_tile<T, D>(q_tile + rows_down<D>(own), dq, factor, lane);
  __syncwarp();
  T* dq_rows =
      static_cast<T*>(op.dq) + b * op.dq_strides[0] + h * op.dq_strides[1] + (first_row + own) * op.dq_strides[2];
  write_tile<T, D, 16 * M>(q_tile + rows_down<D>(own), dq_rows, op.dq_strides[2], rows - own, lane);
}

size_t attention_backward_workspace(const AttentionBackward& op) {
  return size_t(op.problem.B * op.problem.H * op.problem.T) * sizeof(float);
}

template <typename T, int D, int SIDES>
int launch_keys(const BackwardProblem& whole, Stream stream) {
  using Shape = KeysShape<D, SIDES>;
  const AttentionProblem& p = whole.op.problem;
  const dim3 grid(unsigned(ceil_div(p.S, Shape::BLOCK_K)), unsigned(p.G), unsigned(p.B));
  return launch(attention_backward_keys_kernel<T, D, SIDES>, grid, dim3(Shape::THREADS), Shape::SHARED_BYTES, stream,
                whole);
}

// 2 dtypes x 2 widths = 4 builds of each of the 3 kernels, and at D = 128 two of the one for keys.
int attention_backward(const AttentionBackward& op, void* workspace, Stream stream) {
  const AttentionProblem& p = op.problem;
  if (!takes_tensor_cores(p)) return cudaErrorInvalidValue;
  const BackwardProblem whole{op, static_cast<float*>(workspace)};
  return with_type_and_width(p, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int D = decltype(width)::value;
    const dim3 threads(WARPS * 32), per_row(unsigned(ceil_div(p.B * p.H * p.T, WARPS)));
    const dim3 per_queries(unsigned(ceil_div(p.T, QueriesShape<D>::BLOCK_M)), unsigned(p.H), unsigned(p.B));
    int error = launch(attention_delta_kernel<T, D>, per_row, threads, 0, stream, whole);
    if (error != cudaSuccess) return error;
    const bool has_room = shared_bytes_limit() >= KeysShape<D, D / 64>::SHARED_BYTES;
    error = has_room ? launch_keys<T, D, D / 64>(whole, stream) : launch_keys<T, D, 1>(whole, stream);
    if (error != cudaSuccess) return error;
    return launch(attention_backward_queries_kernel<T, D>, per_queries, threads, QueriesShape<D>::SHARED_BYTES, stream,
                  whole);
  });
}

}  // namespace llmcore::cuda
