// Tensor cores by mma.sync.m16n8k16 and what feeds them: ldmatrix, cp.async, swizzled tiles in shared memory.
//
// Fragments, as the PTX manual lays them out. An accumulator c[m][n] is 16 x 8: this lane has row lane / 4, columns
// 2 * (lane % 4) and the next, and the same of row + 8. Two neighbours along n, packed to 16 bits, are an operand A
// of depth 16: so the result of one product feeds the next without leaving registers.
#pragma once

#include "load.cuh"

namespace llmcore::cuda {

// --- Copies from global to shared memory that pass by the registers ---

// 16 bytes, or zeros when not `valid`; then nothing is read.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// One float, or zero.
__device__ inline void copy_float_async(uint32_t to, const float* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- Tiles: rows of D 16-bit elements ---
//
// The 16-byte pieces of row r are permuted by r % 8, so that the same piece of 8 rows, which is what a phase of
// ldmatrix reads, lies in 8 different groups of banks.
template <int D>
struct Tile {
  static constexpr int PIECES = D / 8, ROW_BYTES = D * 2;

  __device__ static uint32_t at(int row, int piece) {
    return uint32_t(row * ROW_BYTES) + (uint32_t(piece ^ (row & 7)) << 4);
  }

  // Rows [0, ROWS) of a tile from rows `stride` elements apart, by THREADS threads; rows from `valid` on are zeros.
  // One address that grows: those of all of a thread's rows would be kept in registers.
  template <int ROWS, int THREADS, typename T>
  __device__ static void copy(uint32_t tile, const T* from, int64_t stride, int valid, int thread) {
    constexpr int step = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0 && ROWS % step == 0);
    const int first = thread / PIECES, piece = thread % PIECES;
    from += first * stride + piece * 8;
#pragma unroll
    for (int row = first; row < first + ROWS; row += step) {
      copy_async(tile + at(row, piece), from, row < valid);
      from += step * stride;
    }
  }
};

// --- Fragments ---

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b, float32 sums.
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Where a lane reads of a tile: the address of depth step k is base ^ (k << 5), of 16 rows further down, or of another
// tile, a constant `offset` more, which takes no register. `left`: operand A, or B by rows of its own, transposed.
// `right`: B by columns, which are the tile's rows.
template <int D>
__device__ uint32_t left_base(uint32_t tile, int lane) {
  return tile + Tile<D>::at(lane & 15, lane >> 4);
}
template <int D>
__device__ uint32_t right_base(uint32_t tile, int lane) {
  return tile + Tile<D>::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}
template <int D>
__device__ constexpr uint32_t rows_down(int rows) {
  return uint32_t(rows * Tile<D>::ROW_BYTES);
}

// 16 * M rows of a tile as operand A, for one step of 16 along D.
template <int D, int M>
__device__ void load_left(uint32_t (&a)[M][4], uint32_t base, int k, uint32_t offset = 0) {
#pragma unroll
  for (int m = 0; m < M; ++m) load_matrices(a[m], (base ^ uint32_t(k << 5)) + (rows_down<D>(16 * m) + offset));
}

// c (16 M x 8 N) += a b^T over D, a (rows of a tile at left_base) and b (8 N rows of a tile at right_base).
template <typename T, int D, int M, int N, typename Left>
__device__ void multiply_rows(float (&c)[M][N][4], Left left, uint32_t b, uint32_t offset = 0) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[M][4];
    left(a, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t r[4];
      load_matrices(r, (b ^ uint32_t(k << 5)) + (rows_down<D>(8 * n) + offset));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(c[m][n], a[m], r[0], r[1]);
        multiply_add<T>(c[m][n + 1], a[m], r[2], r[3]);
      }
    }
  }
}

// Two neighbours of a row of accumulators, rounded, as operand A.
template <typename T>
__device__ void pack_left(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// c (16 M x 8 C) += a b over 16 rows of a tile at left_base: its first 8 C columns, or those that `b` starts at.
template <typename T, int D, int M, int C>
__device__ void multiply_step(float (&c)[M][C][4], const uint32_t (&a)[M][4], uint32_t b, uint32_t offset) {
#pragma unroll
  for (int k = 0; k < C / 2; ++k) {
    uint32_t r[4];
    load_matrices_transposed(r, (b ^ uint32_t(k << 5)) + offset);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<T>(c[m][2 * k], a[m], r[0], r[1]);
      multiply_add<T>(c[m][2 * k + 1], a[m], r[2], r[3]);
    }
  }
}

// c (16 M x D) += p b, p (16 M x 8 N) in accumulators, rounded to T, and b (8 N rows of a tile at left_base).
template <typename T, int D, int M, int N>
__device__ void multiply_columns(float (&c)[M][D / 8][4], const float (&p)[M][N][4], uint32_t b) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) pack_left<T>(a[m], p[m][n], p[m][n + 1]);
    multiply_step<T, D>(c, a, b, rows_down<D>(8 * n));
  }
}

// c, times a factor for each of a lane's rows, rounded, into rows of a tile that this warp alone uses, from 16-byte
// piece `first` on.
template <typename T, int D, int M, int C>
__device__ void store_tile(uint32_t tile, const float (&c)[M][C][4], const float (&factor)[M][2], int lane,
                           int first = 0) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < C; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = pack<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
        const uint32_t address = tile + Tile<D>::at(16 * m + 8 * half + lane / 4, first + n) + uint32_t(lane % 4) * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(pair) : "memory");
      }
    }
  }
}

__device__ inline void load_pieces(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// Operand A in shared memory as its four 8 x 8 matrices, one behind the other: load_matrices at 16 bytes a lane gives
// it back. `address` is at 4 bytes a lane.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + i * 128), "r"(a[i]) : "memory");
}
// The same operand transposed.
__device__ inline void load_left_turned(uint32_t (&a)[4], uint32_t address) {
  uint32_t r[4];
  load_matrices_transposed(r, address);
  a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
}

// Rows [0, ROWS) of a tile, their pieces [first, first + PIECES), to rows `stride` elements apart, those below `valid`,
// by the lanes of a warp.
template <typename T, int D, int ROWS, int PIECES = Tile<D>::PIECES>
__device__ void write_tile(uint32_t tile, T* to, int64_t stride, int valid, int lane, int first = 0) {
#pragma unroll
  for (int i = lane; i < ROWS * PIECES; i += 32) {
    const int row = i / PIECES, piece = first + i % PIECES;
    if (row >= valid) continue;
    uint32_t v[4];
    load_pieces(v, tile + Tile<D>::at(row, piece));
    store_vector(to + row * stride + piece * 8, reinterpret_cast<const Vector<T>&>(v));
  }
}

}  // namespace llmcore::cuda
