// Sums and maxima over the threads that share a row: a warp (blockDim.x == 32), or the whole block.
#pragma once

#include <cmath>

namespace llmcore::cuda {

constexpr unsigned WHOLE_WARP = 0xffffffffu;
constexpr int MAX_WARPS = 32;

struct Sum {
  static constexpr float NEUTRAL = 0.0f;
  __device__ static float combine(float a, float b) { return a + b; }
};

struct Maximum {
  static constexpr float NEUTRAL = -INFINITY;
  __device__ static float combine(float a, float b) { return fmaxf(a, b); }
};

// The same bits in every lane: a and b of a pair are combined in both, and the operations commute.
template <typename Operation>
__device__ float reduce_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = Operation::combine(x, __shfl_xor_sync(WHOLE_WARP, x, offset));
  }
  return x;
}

// Room for the partial results of one call. A later call needs other room, or a barrier in between.
template <int COUNT>
struct ReduceRoom {
  float partial[COUNT][MAX_WARPS];
};

// x[i] becomes the result over the threads of a row. One barrier, none when the row is a warp's.
template <typename Operation, int COUNT>
__device__ void reduce_row(float (&x)[COUNT], ReduceRoom<COUNT>& room) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] = reduce_warp<Operation>(x[i]);
  if (blockDim.x == 32) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 0) {
    for (int i = 0; i < COUNT; ++i) room.partial[i][warp] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = reduce_warp<Operation>(lane < warps ? room.partial[i][lane] : Operation::NEUTRAL);
  }
}

template <typename Operation>
__device__ float reduce_row(float x, ReduceRoom<1>& room) {
  float one[1] = {x};
  reduce_row<Operation>(one, room);
  return one[0];
}

}  // namespace llmcore::cuda
