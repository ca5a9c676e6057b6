// What sm_90 has for tiles: copies of boxes by tensor maps (TMA), barriers in shared memory that count their bytes
// (mbarrier), and products of a warpgroup, 128 threads, that read shared memory by themselves (wgmma).
//
// Tiles lie in panels of 64 columns, 128 bytes a row, whose 16-byte pieces are permuted as in Tile<64>: what a tensor
// map calls a 128-byte swizzle and a product's descriptor too. A panel starts at a multiple of 1024 bytes.
//
// Copies and products pass by an "async proxy": what threads store (barriers, too) they see after fence_async only. A
// product is under way until wait_products: nothing may touch its registers or write what it reads before.
#pragma once

#include <cuda.h>

#include "mma.cuh"

namespace llmcore::cuda {

constexpr int WARPGROUP = 128, PANEL = 64;

// --- Barriers ---

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The phase ends when so many bytes have arrived, too.
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of that parity is over; that of parity 1 is when a barrier is new.
__device__ inline void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra AGAIN;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- Copies ---

// A box of a tensor (batch, head, position, column) to a panel; what lies outside of the tensor becomes zero.
__device__ inline void copy_box(uint32_t panel, const CUtensorMap& map, int column, int position, int head, int batch,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(panel),
      "l"(&map), "r"(column), "r"(position), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// --- Registers ---

template <int COUNT>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- Products ---

__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler must not move what it does with these registers past the fence or wait beside this.
template <int N>
__device__ void hold(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}
template <int N>
__device__ void hold(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

// A descriptor of an operand in panels: its address, bytes from one panel to the next (where the product goes on from
// panel to panel) and from 8 rows to the next 8, and the swizzle, each in 16 bytes.
__device__ inline uint64_t operand(uint32_t address, int panel_bytes) {
  constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62;
  return SWIZZLE_128 | uint64_t(8 * PANEL * 2 >> 4) << 32 | uint64_t(panel_bytes >> 4) << 16 |
         uint64_t((address & 0x3ffff) >> 4);
}

// In what follows c (64 x N of a warpgroup) is laid out as mma.sync's accumulators: a warp has 16 rows of it.
#define LLMCORE_C4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LLMCORE_C16(c, n) LLMCORE_C4(c, n), LLMCORE_C4(c, n + 1), LLMCORE_C4(c, n + 2), LLMCORE_C4(c, n + 3)
#define LLMCORE_C32(c, n) LLMCORE_C16(c, n), LLMCORE_C16(c, n + 4)
#define LLMCORE_NAMES_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLMCORE_NAMES_64                                                                                             \
  LLMCORE_NAMES_32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// An instruction is text: `multiply` makes it of the name that PTX has for T.
#define LLMCORE_BY_TYPE(T, multiply)           \
  if constexpr (std::is_same_v<T, bfloat16>) { \
    multiply("bf16");                          \
  } else {                                     \
    multiply("f16");                           \
  }

// c = a b^T or, when `add`, c += a b^T over 16 columns: a 64 rows and b 128 rows of panels.
template <typename T>
__device__ void multiply_rows_async(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
#define LLMCORE_MULTIPLY(TYPE)                                                           \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" LLMCORE_NAMES_64 \
      "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                 \
      : LLMCORE_C32(c, 0), LLMCORE_C32(c, 8)                                             \
      : "l"(a), "l"(b), "r"(int(add)))
  LLMCORE_BY_TYPE(T, LLMCORE_MULTIPLY)
#undef LLMCORE_MULTIPLY
}

// c += a b over 16 rows of panels: a in registers, b 64 or 128 columns.
template <typename T>
__device__ void multiply_columns_async(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
#define LLMCORE_MULTIPLY(TYPE)                                                          \
  asm volatile(                                                                         \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" LLMCORE_NAMES_32 \
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"                                  \
      : LLMCORE_C32(c, 0)                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
  LLMCORE_BY_TYPE(T, LLMCORE_MULTIPLY)
#undef LLMCORE_MULTIPLY
}
template <typename T>
__device__ void multiply_columns_async(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#define LLMCORE_MULTIPLY(TYPE)                                                           \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" LLMCORE_NAMES_64 \
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                                   \
      : LLMCORE_C32(c, 0), LLMCORE_C32(c, 8)                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
  LLMCORE_BY_TYPE(T, LLMCORE_MULTIPLY)
#undef LLMCORE_MULTIPLY
}

#undef LLMCORE_BY_TYPE
#undef LLMCORE_C4
#undef LLMCORE_C16
#undef LLMCORE_C32
#undef LLMCORE_NAMES_32
#undef LLMCORE_NAMES_64

}  // namespace llmcore::cuda
