// Tiled fp16/bf16 GEMM: C[M,N] = A[M,K] * B[K,N], row-major, 64x64x32 tiles, 4 warps,
// double-buffered cp.async, ldmatrix(.trans) and mma.sync.m16n8k16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
constexpr int BM = 64, BN = 64, BK = 32, PAD = 8;

__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

template <typename T>
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b);
template <>
__device__ __forceinline__ void mma<__half>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T>
__device__ void gemm_body(const T* A, const T* B, float* C, int M, int N, int K) {
  __shared__ __align__(16) T sa[2][BM][BK + PAD];
  __shared__ __align__(16) T sb[2][BK][BN + PAD];
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  int wm = (warp / 2) * 32, wn = (warp % 2) * 32;
  float acc[2][4][4] = {};
  auto load = [&](int buf, int k0) {
    for (int i = tid; i < BM * BK / 8; i += 128) {
      int r = i / (BK / 8), c = i % (BK / 8) * 8;
      cp16(smem(&sa[buf][r][c]), A + (size_t)(m0 + r) * K + k0 + c);
    }
    for (int i = tid; i < BK * BN / 8; i += 128) {
      int r = i / (BN / 8), c = i % (BN / 8) * 8;
      cp16(smem(&sb[buf][r][c]), B + (size_t)(k0 + r) * N + n0 + c);
    }
    commit();
  };
  load(0, 0);
  for (int k0 = 0, buf = 0; k0 < K; k0 += BK, buf ^= 1) {
    if (k0 + BK < K) {
      load(buf ^ 1, k0 + BK);
#ifndef MUT_WAIT
      wait<1>();
#else
      wait<2>();
#endif
    } else
      wait<0>();
    __syncthreads();
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; ++i) {
        uint32_t p = smem(&sa[buf][wm + i * 16 + lane % 16][kk + lane / 16 * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3])
                     : "r"(p));
      }
      for (int j = 0; j < 4; ++j) {
        uint32_t p = smem(&sb[buf][kk + lane % 16][wn + j * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b[j][0]), "=r"(b[j][1])
                     : "r"(p));
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) mma<T>(acc[i][j], a[i], b[j]);
    }
#ifndef MUT_NOSYNC
    __syncthreads();
#endif
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      int r = m0 + wm + i * 16 + lane / 4, c = n0 + wn + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(C + (size_t)r * N + c) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(C + (size_t)(r + 8) * N + c) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
}
extern "C" __global__ void gemm_f16(const __half* A, const __half* B, float* C, int M, int N, int K) {
  gemm_body(A, B, C, M, N, K);
}
extern "C" __global__ void gemm_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K) {
  gemm_body(A, B, C, M, N, K);
}
