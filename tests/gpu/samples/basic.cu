// Small CUDA C++ kernels that the ptxsim tests compile with nvcc -ptx and run without a GPU.
// MUT_* macros seed the defects that the mutation tests expect the checkers to find.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifdef MUT_BOUND
#define IN_RANGE(i, n) ((i) <= (n))
#else
#define IN_RANGE(i, n) ((i) < (n))
#endif
#ifdef MUT_NOSYNC
#define SYNC()
#else
#define SYNC() __syncthreads()
#endif
#ifdef MUT_MASK
#define FULL 0x0000ffffu
#else
#define FULL 0xffffffffu
#endif

extern "C" __global__ void vadd(const float* __restrict__ a, const float* __restrict__ b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (IN_RANGE(i, n)) c[i] = a[i] + b[i];
}

__device__ float warp_max(float v) {
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
  return v;
}
__device__ float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
  return v;
}

// One warp per row.
extern "C" __global__ void softmax_rows(const float* x, float* y, int rows, int cols) {
  int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
  if (row >= rows) return;
  const float* xr = x + (size_t)row * cols;
  float m = -INFINITY, s = 0.f;
  for (int c = lane; c < cols; c += 32) m = fmaxf(m, xr[c]);
  m = warp_max(m);
  for (int c = lane; c < cols; c += 32) s += expf(xr[c] - m);
  s = warp_sum(s);
  for (int c = lane; c < cols; c += 32) y[(size_t)row * cols + c] = expf(xr[c] - m) / s;
}

// One block per row; shared-memory tree over warps, half2 loads.
extern "C" __global__ void layernorm_f16(const __half* x, const float* gamma, const float* beta, __half* y, int cols,
                                         float eps) {
  __shared__ float part[2][32];
  __shared__ float stat[2];
  const __half2* xr = reinterpret_cast<const __half2*>(x + (size_t)blockIdx.x * cols);
  float s = 0.f, q = 0.f;
  for (int c = threadIdx.x; c < cols / 2; c += blockDim.x) {
    float2 v = __half22float2(xr[c]);
    s += v.x + v.y;
    q += v.x * v.x + v.y * v.y;
  }
  s = warp_sum(s);
  q = warp_sum(q);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, nw = blockDim.x / 32;
  if (lane == 0) {
    part[0][warp] = s;
    part[1][warp] = q;
  }
  SYNC();
  if (warp == 0) {
    s = warp_sum(lane < nw ? part[0][lane] : 0.f);
    q = warp_sum(lane < nw ? part[1][lane] : 0.f);
    if (lane == 0) {
      stat[0] = s / cols;
      stat[1] = rsqrtf(q / cols - (s / cols) * (s / cols) + eps);
    }
  }
  SYNC();
  float mean = stat[0], rstd = stat[1];
  __half2* yr = reinterpret_cast<__half2*>(y + (size_t)blockIdx.x * cols);
  for (int c = threadIdx.x; c < cols / 2; c += blockDim.x) {
    float2 v = __half22float2(xr[c]);
    float2 o = {(v.x - mean) * rstd * gamma[2 * c] + beta[2 * c],
                (v.y - mean) * rstd * gamma[2 * c + 1] + beta[2 * c + 1]};
    yr[c] = __float22half2_rn(o);
  }
}

extern "C" __global__ void gelu_bf16(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = __bfloat162float(x[i]);
  y[i] = __float2bfloat16(0.5f * v * (1.f + erff(v * 0.70710678f)));
}

extern "C" __global__ void histogram(const int* x, int* hist, int n, int bins) {
  extern __shared__ int local_hist[];
  for (int b = threadIdx.x; b < bins; b += blockDim.x) local_hist[b] = 0;
  SYNC();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local_hist[x[i] % bins], 1);
  SYNC();
  for (int b = threadIdx.x; b < bins; b += blockDim.x) atomicAdd(&hist[b], local_hist[b]);
}

// Divergent loop: each thread iterates a different number of times.
extern "C" __global__ void collatz(const int* x, int* steps, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long v = x[i];
  int s = 0;
  while (v != 1 && s < 1000) {
    v = (v & 1) ? 3 * v + 1 : v / 2;
    ++s;
  }
  steps[i] = s;
}

// Uninitialised shared memory: only even threads write before everyone reads.
extern "C" __global__ void uninit_shared(const float* x, float* y) {
  __shared__ float buf[64];
#ifndef MUT_UNINIT
  buf[threadIdx.x] = x[threadIdx.x];
#else
  if (threadIdx.x % 2 == 0) buf[threadIdx.x] = x[threadIdx.x];
#endif
  __syncthreads();
  y[threadIdx.x] = buf[63 - threadIdx.x];
}

// Transpose with or without padding (bank conflicts).
template <int PAD>
__device__ void transpose_body(const float* x, float* y, int n) {
  __shared__ float tile[32][32 + PAD];
  int bx = blockIdx.x * 32, by = blockIdx.y * 32;
  for (int j = threadIdx.y; j < 32; j += blockDim.y) tile[j][threadIdx.x] = x[(by + j) * n + bx + threadIdx.x];
  __syncthreads();
  for (int j = threadIdx.y; j < 32; j += blockDim.y) y[(bx + j) * n + by + threadIdx.x] = tile[threadIdx.x][j];
}
extern "C" __global__ void transpose_padded(const float* x, float* y, int n) { transpose_body<1>(x, y, n); }
extern "C" __global__ void transpose_conflicts(const float* x, float* y, int n) { transpose_body<0>(x, y, n); }

// Misaligned vector access: pointer advanced by one float, then read as float4.
extern "C" __global__ void load_vec4(const float* x, float4* y, int offset) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + offset + 4 * threadIdx.x);
}
