// Elementwise work in pieces of 16 bytes, or of one element where rows are not aligned.
#pragma once

#include "load.cuh"

namespace llmcore::cuda {

constexpr int THREADS = 256;

// function(first) for each piece of STEP elements of a row; a block has blockDim.y rows.
template <int STEP, typename Function>
__device__ void each_piece(int64_t width, Function function) {
  for (int64_t first = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * STEP; first < width;
       first += int64_t(gridDim.y) * blockDim.x * STEP) {
    function(first);
  }
}

template <typename T, int STEP>
__device__ void load_piece(float (&x)[STEP], const T* from) {
  if constexpr (STEP == 1) {
    x[0] = widen(*from);
  } else {
    constexpr int WIDTH = Vector<T>::WIDTH;
#pragma unroll
    for (int k = 0; k < STEP; k += WIDTH) {
      const Vector<T> v = load_vector(from + k);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) x[k + i] = widen(v.values[i]);
    }
  }
}

template <typename T, int STEP>
__device__ void store_piece(T* to, const float (&x)[STEP]) {
  if constexpr (STEP == 1) {
    *to = narrow<T>(x[0]);
  } else {
    store_vector(to, narrow_vector<T>(x));
  }
}

// A row's pieces across threads, and several rows a block where they are short.
struct PieceShape {
  dim3 grid, threads;

  PieceShape(int64_t rows, int64_t pieces) {
    int64_t across = 4;
    while (across < pieces && across < THREADS) across *= 2;
    threads = dim3(unsigned(across), unsigned(THREADS / across));
    grid = dim3(unsigned(ceil_div(rows, threads.y)), unsigned(pieces > across ? ceil_div(pieces, across) : 1));
    if (grid.y > 65535) grid.y = 65535;
  }
};

}  // namespace llmcore::cuda
