// attention for few queries (decoding): the keys are split over blocks, and a second kernel combines the parts.
//
// The queries of all heads that share a key/value head are the rows of one 16-row product, so K and V are read once for
// all of them. A block has SPLIT keys of a sequence and head; its warps take turns at 16 keys, each with copies under
// way for itself (STAGES deep, no barrier in the loop), and their results are merged in a fixed order. The length of a
// part is a constant: a row's bits depend on neither the batch nor the device. Bound by memory: K and V, once.
#pragma once

#include "attention.cuh"

namespace llmcore::cuda {

constexpr int DECODE_ROWS = 16, SPLIT = 512, STEP = 16;

template <int D>
struct DecodeShape {
  static constexpr int STAGES = 3, TILE_BYTES = STEP * D * 2, WARP_BYTES = STAGES * 2 * TILE_BYTES;
  static constexpr int OUT_BYTES = DECODE_ROWS * (D + 8) * 4, ROWS_BYTES = 2 * WARPS * DECODE_ROWS * 4;
  static constexpr int OUT_PITCH =
      D + 8;  // floats of a row of a warp's result: 8 banks on, so that rows don't conflict
  // The queries' tile; the warps' stages, whose place their results take at the end; each row's maximum and sum.
  static constexpr int SHARED_BYTES = DECODE_ROWS * D * 2 + WARPS * WARP_BYTES + ROWS_BYTES;
  static_assert(OUT_BYTES <= WARP_BYTES);
};

inline bool is_decode(const AttentionProblem& p) { return p.G > 0 && p.H / p.G * p.T <= DECODE_ROWS; }
inline int64_t decode_splits(const AttentionProblem& p) { return p.S <= SPLIT ? 1 : ceil_div(p.S, SPLIT); }

// A part's result (B, H, T, splits, D) and log of its weights' sum (B, H, T, splits), in float32.
inline size_t decode_workspace(const AttentionProblem& p) {
  const int64_t splits = decode_splits(p);
  return splits == 1 ? 0 : size_t(p.B * p.H * p.T * splits * (p.D + 1)) * sizeof(float);
}

template <typename T, int D>
__global__ void __launch_bounds__(WARPS * 32)
    attention_decode_kernel(const AttentionForward op, float* parts, float* part_lse) {
  using Shape = DecodeShape<D>;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.z, g = blockIdx.y, share = p.H / p.G;
  const int queries = int(p.T), rows = int(share * p.T);
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides[0] + g * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides[0] + g * p.v_strides[1];
  const uint32_t q_tile = shared_address(shared), stages = q_tile + DECODE_ROWS * D * 2 + warp * Shape::WARP_BYTES;

  // Row r is query r % T of head g * share + r / T.
  const T* q = static_cast<const T*>(p.q) + b * p.q_strides[0] + g * share * p.q_strides[1];
  for (int i = threadIdx.x; i < DECODE_ROWS * Tile<D>::PIECES; i += WARPS * 32) {
    const int row = i / Tile<D>::PIECES, piece = i % Tile<D>::PIECES, head = row / queries;
    copy_async(q_tile + Tile<D>::at(row, piece),
               q + head * p.q_strides[1] + (row - head * queries) * p.q_strides[2] + piece * 8, row < rows);
  }
  commit_copies();

  const Keys keys(p, b);
  const Scores scores(p);
  // A lane's two rows; their intervals, and the union of all.
  int low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    low[half] = keys.low(row % queries), high[half] = row < rows ? keys.high(row % queries) : 0;
  }
  const int part_from = int(blockIdx.x) * SPLIT, part_to = part_from + SPLIT;
  const int from = keys.low(0) > part_from ? keys.low(0) : part_from;
  const int to = keys.high(queries - 1) < part_to ? keys.high(queries - 1) : part_to;
  const int first = part_from / STEP + warp;
  const auto seen = [&](int step) { return step * STEP < to && step * STEP + STEP > from; };
  const auto fetch = [&](int step) {
    if (seen(step)) {
      const int key = step * STEP, turn = (step - first) / WARPS % Shape::STAGES;
      const uint32_t stage = stages + turn * 2 * Shape::TILE_BYTES;
      Tile<D>::template copy<STEP, 32>(stage, k + key * p.k_strides[2], p.k_strides[2], keys.length - key, lane);
      Tile<D>::template copy<STEP, 32>(stage + Shape::TILE_BYTES, v + key * p.v_strides[2], p.v_strides[2],
                                       keys.length - key, lane);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Shape::STAGES - 1; ++i) fetch(first + i * WARPS);
  wait_copies<Shape::STAGES - 1>();
  __syncthreads();
  uint32_t q_kept[D / 16][1][4];
#pragma unroll
  for (int step = 0; step < D / 16; ++step) load_left<D>(q_kept[step], left_base<D>(q_tile, lane), step);

  float out[1][D / 8][4] = {};
  OnlineSoftmax<1> softmax;
  for (int step = first; step * STEP < part_to && step * STEP < to; step += WARPS) {
    fetch(step + (Shape::STAGES - 1) * WARPS);
    wait_copies<Shape::STAGES - 1>();
    __syncwarp();
    if (seen(step)) {
      const uint32_t stage = stages + (step - first) / WARPS % Shape::STAGES * 2 * Shape::TILE_BYTES;
      float s[1][STEP / 8][4] = {};
      const auto load_q = [&](uint32_t (&a)[1][4], int at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[0][i] = q_kept[at][0][i];
      };
      multiply_rows<T, D>(s, load_q, right_base<D>(stage, lane));
      scores.cap(s);
#pragma unroll
      for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = step * STEP + 8 * n + 2 * (lane % 4) + i % 2;
          if (key < low[i / 2] || key >= high[i / 2]) s[0][n][i] = -INFINITY;
        }
      }
      float decay[1][2];
      softmax.weigh(s, decay, scores.factor);
      softmax.scale(out, decay);
      multiply_columns<T, D>(out, s, left_base<D>(stage + Shape::TILE_BYTES, lane));
    }
    __syncwarp();  // all lanes have read the stage that the next round's copy overwrites
  }
  wait_copies<0>();
  __syncthreads();

  // The warps' results, side by side: each row's maximum and sum, and the result relative to them.
  float* maxima = reinterpret_cast<float*>(shared + DECODE_ROWS * D * 2 + WARPS * Shape::WARP_BYTES);
  float* sums = maxima + WARPS * DECODE_ROWS;
  float* warp_out = reinterpret_cast<float*>(shared + DECODE_ROWS * D * 2 + warp * Shape::WARP_BYTES);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    const float sum = quad_sum(softmax.sum[0][half]);
    if (lane % 4 == 0)
      maxima[warp * DECODE_ROWS + row] = softmax.maximum[0][half], sums[warp * DECODE_ROWS + row] = sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(warp_out + row * Shape::OUT_PITCH + 8 * n + 2 * (lane % 4)) =
          make_float2(out[0][n][2 * half], out[0][n][2 * half + 1]);
    }
  }
  __syncthreads();

  const bool whole = gridDim.x == 1;
  for (int i = threadIdx.x; i < rows * D; i += WARPS * 32) {
    const int row = i / D, column = i % D;
    float maximum = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) maximum = fmaxf(maximum, maxima[w * DECODE_ROWS + row]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float own = maxima[w * DECODE_ROWS + row];
      const float weight = own == -INFINITY ? 0.0f : exp2_approximately((own - maximum) * scores.factor);
      const char* other = shared + DECODE_ROWS * D * 2 + w * Shape::WARP_BYTES;
      sum += sums[w * DECODE_ROWS + row] * weight;
      total += reinterpret_cast<const float*>(other)[row * Shape::OUT_PITCH + column] * weight;
    }
    const float y = sum == 0.0f ? 0.0f : total / sum;
    const float lse = sum == 0.0f ? -INFINITY : (maximum * scores.factor + log2f(sum)) / LOG2E;
    const int64_t h = g * share + row / queries, t = row % queries, place = (b * p.H + h) * p.T + t;
    if (whole) {
      static_cast<T*>(op.out)[b * op.out_strides[0] + h * op.out_strides[1] + t * op.out_strides[2] + column] =
          narrow<T>(y);
    } else {
      parts[(place * gridDim.x + blockIdx.x) * D + column] = y;
    }
    if (column == 0) (whole ? op.lse + place : part_lse + place * gridDim.x + blockIdx.x)[0] = lse;
  }
}

// A block for each query and head, a thread for each column: the parts, weighted by their sums, in order.
template <typename T, int D>
__global__ void __launch_bounds__(D)
    attention_combine_kernel(const AttentionForward op, const float* parts, const float* part_lse, int splits) {
  const AttentionProblem& p = op.problem;
  const int64_t place = blockIdx.x, t = place % p.T, h = place / p.T % p.H, b = place / p.T / p.H;
  float maximum = -INFINITY, sum = 0.0f, total = 0.0f;
  for (int i = 0; i < splits; ++i) maximum = fmaxf(maximum, part_lse[place * splits + i]);
  for (int i = 0; i < splits; ++i) {
    const float own = part_lse[place * splits + i];
    const float weight = own == -INFINITY ? 0.0f : exp2_approximately((own - maximum) * LOG2E);
    sum += weight;
    total += parts[(place * splits + i) * D + threadIdx.x] * weight;
  }
  static_cast<T*>(op.out)[b * op.out_strides[0] + h * op.out_strides[1] + t * op.out_strides[2] + threadIdx.x] =
      narrow<T>(sum == 0.0f ? 0.0f : total / sum);
  if (threadIdx.x == 0) op.lse[place] = sum == 0.0f ? -INFINITY : maximum + logf(sum);
}

template <typename T, int D>
int decode(const AttentionForward& op, float* workspace, Stream stream) {
  const AttentionProblem& p = op.problem;
  const int splits = int(decode_splits(p));
  float* part_lse = workspace + p.B * p.H * p.T * splits * D;
  const int error = launch(attention_decode_kernel<T, D>, dim3(unsigned(splits), unsigned(p.G), unsigned(p.B)),
                           dim3(WARPS * 32), DecodeShape<D>::SHARED_BYTES, stream, op, workspace, part_lse);
  if (error != cudaSuccess || splits == 1) return error;
  return launch(attention_combine_kernel<T, D>, dim3(unsigned(p.B * p.H * p.T)), dim3(D), 0, stream, op, workspace,
                part_lse, splits);
}

}  // namespace llmcore::cuda
