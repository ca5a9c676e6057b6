// A row held in registers, so that memory is read once: blockDim.x threads own a row, blockDim.y rows share a block.
#pragma once

#include "load.cuh"

namespace llmcore::cuda {

constexpr int ROW_VALUES = 16;         // elements of a row in one thread's registers
constexpr int FORWARD_THREADS = 1024;  // of a row: rows of at most 16384 elements
constexpr int BACKWARD_THREADS = 512;  // rows of at most 8192: gradients of parameters stay in registers too

// The part of a row that one thread holds. ALIGNED: rows start at multiples of 16 bytes and each access moves 16;
// otherwise (widths that are no multiple of that, which models don't have) elements are moved one by one. Elements past
// the width are 0.
template <typename T, bool ALIGNED>
struct Row {
  static constexpr int WIDTH = Vector<T>::WIDTH, VECTORS = ROW_VALUES / WIDTH;
  Vector<T> vectors[VECTORS];

  __device__ static int position(int vector, int i) {
    return (vector * int(blockDim.x) + int(threadIdx.x)) * WIDTH + i;
  }

  __device__ void load(const T* row, int width) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      if constexpr (ALIGNED) {
        vectors[k] = position(k, 0) < width ? load_vector(row + position(k, 0)) : Vector<T>{};
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          vectors[k].values[i] = position(k, i) < width ? row[position(k, i)] : narrow<T>(0.0f);
        }
      }
    }
  }

  __device__ void store(T* row, int width) const {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      if constexpr (ALIGNED) {
        if (position(k, 0) < width) store_vector(row + position(k, 0), vectors[k]);
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          if (position(k, i) < width) row[position(k, i)] = vectors[k].values[i];
        }
      }
    }
  }

  __device__ float at(int vector, int i) const { return widen(vectors[vector].values[i]); }

  // function(vector, i) for each element that lies inside of the row.
  template <typename Function>
  __device__ static void each(int width, Function function) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      if (ALIGNED && position(k, 0) >= width) continue;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (ALIGNED || position(k, i) < width) function(k, i);
      }
    }
  }

  // function(vector, x) turns the numbers x of each vector into others, which are rounded.
  template <typename Function>
  __device__ void change(Function function) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      float x[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) x[i] = at(k, i);
      function(k, x);
      vectors[k] = narrow_vector<T>(x);
    }
  }
};

// A vector of parameters in a row's places, in the row's dtype or float32; `absent` where there is none. Each vector is
// loaded where it is used: it comes from L1, and registers are what a row is short of.
template <typename T, bool ALIGNED>
struct Parameters {
  const void* data;
  Dtype dtype;
  int width;
  float absent;

  using Places = Row<T, ALIGNED>;
  static constexpr int WIDTH = Places::WIDTH;

  __device__ void load(int vector, float (&x)[WIDTH]) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) x[i] = absent;
    } else if (sizeof(T) == 4 || dtype == Dtype::float32) {
      load_as(static_cast<const float*>(data), vector, x);
    } else {
      load_as(static_cast<const T*>(data), vector, x);
    }
  }

  template <typename U>
  __device__ void load_as(const U* from, int vector, float (&x)[WIDTH]) const {
    constexpr int STEP = ALIGNED ? Vector<U>::WIDTH : 1;
#pragma unroll
    for (int i = 0; i < WIDTH; i += STEP) {
      const int place = Places::position(vector, i);
      if constexpr (ALIGNED) {
        const Vector<U> part = place < width ? load_vector(from + place) : Vector<U>{};
#pragma unroll
        for (int j = 0; j < STEP; ++j) x[i + j] = widen(part.values[j]);
      } else {
        x[i] = place < width ? widen(from[place]) : 0.0f;
      }
    }
  }
};

// Sums over rows, in float32, in a row's places.
template <typename T, bool ALIGNED>
struct ParameterSums {
  using Places = Row<T, ALIGNED>;
  float values[ROW_VALUES];

  __device__ float& at(int vector, int i) { return values[vector * Places::WIDTH + i]; }

  __device__ void store(float* data, int width) {
#pragma unroll
    for (int k = 0; k < Places::VECTORS; ++k) {
#pragma unroll
      for (int i = 0; i < Places::WIDTH; i += ALIGNED ? 4 : 1) {
        const int place = Places::position(k, i);
        if (place >= width) continue;
        if constexpr (ALIGNED) {
          store_vector(data + place, Vector<float>{at(k, i), at(k, i + 1), at(k, i + 2), at(k, i + 3)});
        } else {
          data[place] = at(k, i);
        }
      }
    }
  }
};

// Threads of a row, rows of a block. Two vectors a thread where the row is short, all that it holds where it is long.
struct RowShape {
  dim3 threads;
  int64_t blocks;

  RowShape(int64_t rows, int64_t width, int64_t element_bytes) {
    const int64_t values = width <= 4096 ? 2 * 16 / element_bytes : ROW_VALUES;
    const int64_t across = ceil_div(ceil_div(width, values), 32) * 32;
    const int64_t together = across == 32 ? 4 : 1;
    threads = dim3(unsigned(across), unsigned(together));
    blocks = ceil_div(rows, together);
  }
};

}  // namespace llmcore::cuda
