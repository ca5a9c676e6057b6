// attention, forward: a block has 128 queries of a head, a warp 32 of them, and walks over the keys with the softmax
// online (Dao, FlashAttention-2, 2023, algorithm 1).
//
// Per block of keys: K and V of the next one are on their way by cp.async while this one's products run (two stages,
// one barrier an iteration). Q stays in registers at D = 64; at 128 the result takes 128 of them, and Q is read again
// from shared memory: with 32 rows a warp each ldmatrix of K or V feeds 4 products, so that shared memory keeps up with
// the tensor cores. Key blocks are 64 long at D = 64 and 32 at 128: the scores fit beside the result without spilling.
// Bound by the tensor cores; Q, K, V and the result move once each way, 128 bits at a time.
#include "attention_decode.cuh"

namespace llmcore::cuda {

template <int D>
struct ForwardShape {
  static constexpr int M = 2, BLOCK_M = WARPS * 16 * M, BLOCK_N = D == 64 ? 64 : 32, N = BLOCK_N / 8, STAGES = 2;
  static constexpr int Q_BYTES = BLOCK_M * D * 2, TILE_BYTES = BLOCK_N * D * 2;
  static constexpr int SHARED_BYTES = Q_BYTES + STAGES * 2 * TILE_BYTES;
};

template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32) attention_forward_kernel(const AttentionForward op) {
  using Shape = ForwardShape<D>;
  constexpr int M = Shape::M, N = Shape::N, BLOCK_M = Shape::BLOCK_M, BLOCK_N = Shape::BLOCK_N;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t b = blockIdx.z, h = blockIdx.y, g = h / (p.H / p.G);
  const int64_t first_row = int64_t(gridDim.x - 1 - blockIdx.x) * BLOCK_M;  // the longest causal rows start first
  const int rows = int(p.T - first_row < BLOCK_M ? p.T - first_row : BLOCK_M);
  const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] + h * p.q_strides[1] + first_row * p.q_strides[2];
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + g * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + g * p.v_strides[1];
  const uint32_t q_tile = shared_address(shared), k_tiles = q_tile + Shape::Q_BYTES;
  const uint32_t v_tiles = k_tiles + Shape::STAGES * Shape::TILE_BYTES;

  const Keys keys(p, b);
  const Scores scores(p);
  const KeyBlocks blocks(keys, first_row, first_row + rows - 1, BLOCK_N);
  const auto fetch = [&](int block) {
    const int key = block * BLOCK_N, stage = block % Shape::STAGES;
    Tile<D>::template copy<BLOCK_N, WARPS * 32>(k_tiles + stage * Shape::TILE_BYTES, k + key * p.k_strides[2],
                                                p.k_strides[2], keys.length - key, thread);
    Tile<D>::template copy<BLOCK_N, WARPS * 32>(v_tiles + stage * Shape::TILE_BYTES, v + key * p.v_strides[2],
                                                p.v_strides[2], keys.length - key, thread);
  };

  Tile<D>::template copy<BLOCK_M, WARPS * 32>(q_tile, q, p.q_strides[2], rows, thread);
  if (blocks.first < blocks.end) fetch(blocks.first);
  commit_copies();
  const uint32_t own_rows = rows_down<D>(16 * M * warp);
  const uint32_t q_base = left_base<D>(q_tile + own_rows, lane);
  uint32_t q_kept[D == 64 ? D / 16 : 1][M][4];
  if constexpr (D == 64) {
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) load_left<D>(q_kept[step], q_base, step);
  }
  const auto load_q = [&](uint32_t (&a)[M][4], int step) {
    if constexpr (D == 64) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = q_kept[step][m][i];
    } else {
      load_left<D>(a, q_base, step);
    }
  };

  float out[M][D / 8][4] = {};
  OnlineSoftmax<M> softmax;
  for (int block = blocks.first; block < blocks.end; ++block) {
    wait_copies<0>();
    __syncthreads();  // this block's keys are there, and no warp reads the last one's any more
    if (block + 1 < blocks.end) fetch(block + 1);
    commit_copies();
    const uint32_t stage = uint32_t(block % Shape::STAGES * Shape::TILE_BYTES);
    float s[M][N][4] = {};
    multiply_rows<T, D>(s, load_q, right_base<D>(k_tiles + stage, lane));
    scores.cap(s);
    if (blocks.cuts(block)) {
      mask_outside<false>(s, keys, first_row + 16 * M * warp, block * BLOCK_N, -INFINITY, lane);
    }
    float decay[M][2];
    softmax.weigh(s, decay, scores.factor);
    softmax.scale(out, decay);
    multiply_columns<T, D>(out, s, left_base<D>(v_tiles + stage, lane));
  }
  wait_copies<0>();
  if (blocks.first >= blocks.end) __syncthreads();  // Q's tile, which is written below, has arrived for all

  float factor[M][2];
  const int warp_row = 16 * M * warp;
  softmax.finish(factor, op.lse + (b * p.H + h) * p.T + first_row + warp_row, rows - warp_row, scores.factor, lane);
  // By way of this warp's rows of Q's tile, which nobody else reads, so that the result leaves 128 bits at a time.
  __syncwarp();
  store_tile<T, D>(q_tile + own_rows, out, factor, lane);
  __syncwarp();
  T* y = static_cast<T*>(op.out) + b * op.out_strides[0] + h * op.out_strides[1] +
         (first_row + warp_row) * op.out_strides[2];
  write_tile<T, D, 16 * M>(q_tile + own_rows, y, op.out_strides[2], rows - warp_row, lane);
}

size_t attention_forward_workspace(const AttentionForward& op) {
  return is_decode(op.problem) ? decode_workspace(op.problem) : 0;
}

int attention_forward(const AttentionForward& op, void* workspace, Stream stream) {
  const AttentionProblem& p = op.problem;
  if (!takes_tensor_cores(p)) return cudaErrorInvalidValue;
  if (p.B == 0 || p.T == 0) return cudaSuccess;
  return with_type_and_width(p, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int D = decltype(width)::value;
    if (is_decode(p)) return decode<T, D>(op, static_cast<float*>(workspace), stream);
    if (compute_capability() == 90 && attention_fits_sm90(p)) return attention_forward_sm90(op, stream);
    using Shape = ForwardShape<D>;
    const dim3 grid(unsigned(ceil_div(p.T, Shape::BLOCK_M)), unsigned(p.H), unsigned(p.B));
    return launch(attention_forward_kernel<T, D>, grid, dim3(WARPS * 32), Shape::SHARED_BYTES, stream, op);
  });
}

}  // namespace llmcore::cuda
