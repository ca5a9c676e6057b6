// layer_norm and rms_norm, alone or after an addition, forward and backward: one body.
//
// Forward a row belongs to a warp (short rows) or a block and stays in registers: each element is read once and
// written once. Backward a fixed number of blocks walk over the rows, each with its own sums of dweight and dbias in
// registers; a second kernel adds the blocks' sums in order, so that the bits are the same on every run and device.
// Bound by memory: 2 elements moved an element forward (4 with an addition), 3 (4) backward, 128 bits at a time.
#pragma once

#include "launch.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace llmcore::cuda {

constexpr int64_t PARTIALS = 264;  // blocks of the backward pass: two for each of an H100's 132 multiprocessors

struct NormForward {
  const void* x;
  const void* residual;  // ADD only
  const void* weight;
  const void* bias;
  void* y;
  void* total;  // ADD only
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype, bias_dtype;
};

struct NormBackward {
  const void* dy;
  const void* x;
  const void* weight;
  const void* dtotal;  // ADD only, or null
  void* dx;
  float* dweight;
  float* dbias;
  float* partial;  // (blocks, width), twice with dbias
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// What a row is shifted by and scaled by: (mean, 1/sqrt(variance + eps)), or (0, 1/sqrt(mean square + eps)).
struct Statistics {
  float mean, rstd;
};
struct StatisticsRoom {
  ReduceRoom<1> mean, square;
};

template <typename T, bool CENTER, bool ALIGNED>
__device__ Statistics row_statistics(const Row<T, ALIGNED>& row, int width, float eps, StatisticsRoom& room) {
  float mean = 0.0f, square = 0.0f;
  if constexpr (CENTER) {
    row.each(width, [&](int k, int i) { mean += row.at(k, i); });
    mean = reduce_row<Sum>(mean, room.mean) / float(width);
  }
  row.each(width, [&](int k, int i) { square += (row.at(k, i) - mean) * (row.at(k, i) - mean); });
  return {mean, rsqrtf(reduce_row<Sum>(square, room.square) / float(width) + eps)};
}

template <typename T, bool CENTER, bool ADD, bool ALIGNED>
__global__ void __launch_bounds__(FORWARD_THREADS) norm_forward_kernel(const NormForward op) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= op.rows) return;
  const int width = int(op.width);
  const int64_t start = index * op.width;
  Row<T, ALIGNED> row;
  row.load(static_cast<const T*>(op.x) + start, width);
  if constexpr (ADD) {
    Row<T, ALIGNED> residual;
    residual.load(static_cast<const T*>(op.residual) + start, width);
    row.change([&](int k, float (&x)[WIDTH]) {
      for (int i = 0; i < WIDTH; ++i) x[i] += residual.at(k, i);
    });
    row.store(static_cast<T*>(op.total) + start, width);
  }

  __shared__ StatisticsRoom room;
  const Statistics s = row_statistics<T, CENTER>(row, width, op.eps, room);
  const Parameters<T, ALIGNED> weight{op.weight, op.weight_dtype, width, 1.0f};
  row.change([&](int k, float (&x)[WIDTH]) {
    float scale[WIDTH], shift[WIDTH] = {};
    weight.load(k, scale);
    if constexpr (CENTER) Parameters<T, ALIGNED>{op.bias, op.bias_dtype, width, 0.0f}.load(k, shift);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = (x[i] - s.mean) * s.rstd * scale[i] + shift[i];
  });
  row.store(static_cast<T*>(op.y) + start, width);
}

// Gradients of one row: dx = rstd (g - mean(g) - u mean(g u)) with u the unit row and g = dy weight; mean(g) is of
// layer_norm only.
template <typename T, bool CENTER, bool ADD, bool ALIGNED>
__global__ void __launch_bounds__(BACKWARD_THREADS) norm_backward_kernel(const NormBackward op) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int width = int(op.width);
  __shared__ StatisticsRoom statistics_room[2];
  __shared__ ReduceRoom<2> sum_room[2];
  const Parameters<T, ALIGNED> weight{op.weight, op.weight_dtype, width, 1.0f};
  ParameterSums<T, ALIGNED> dweight = {}, dbias = {};

  int turn = 0;  // alternating rooms: a row's barriers keep its threads at most one row apart
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; index < op.rows; index += stride, turn ^= 1) {
    const int64_t start = index * op.width;
    Row<T, ALIGNED> row, gradient;
    row.load(static_cast<const T*>(op.x) + start, width);
    gradient.load(static_cast<const T*>(op.dy) + start, width);
    const Statistics s = row_statistics<T, CENTER>(row, width, op.eps, statistics_room[turn]);
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < Row<T, ALIGNED>::VECTORS; ++k) {
      float scale[WIDTH];
      weight.load(k, scale);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {  // past the width dy is 0, and adds nothing
        const float unit = (row.at(k, i) - s.mean) * s.rstd, g = gradient.at(k, i) * scale[i];
        dweight.at(k, i) += gradient.at(k, i) * unit;
        if constexpr (CENTER) dbias.at(k, i) += gradient.at(k, i);
        sums[0] += g * unit;
        if constexpr (CENTER) sums[1] += g;
      }
    }
    reduce_row<Sum>(sums, sum_room[turn]);
    if (op.dx == nullptr) continue;

    const float along = sums[0] / float(width), across = CENTER ? sums[1] / float(width) : 0.0f;
    Row<T, ALIGNED> dtotal = {};
    if constexpr (ADD) {
      if (op.dtotal != nullptr) dtotal.load(static_cast<const T*>(op.dtotal) + start, width);
    }
    row.change([&](int k, float (&x)[WIDTH]) {
      float scale[WIDTH];
      weight.load(k, scale);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float unit = (x[i] - s.mean) * s.rstd, g = gradient.at(k, i) * scale[i];
        x[i] = (g - across - unit * along) * s.rstd;
        if constexpr (ADD) x[i] += dtotal.at(k, i);
      }
    });
    row.store(static_cast<T*>(op.dx) + start, width);
  }

  if (op.partial == nullptr) return;
  const int64_t part = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * op.width;
  dweight.store(op.partial + part, width);
  if constexpr (CENTER) dbias.store(op.partial + stride * op.width + part, width);
}

// sum[blockIdx.y] (width) = the rows of partial[blockIdx.y] (rows, width), added in a fixed order.
constexpr int SUM_SLICES = 8;
static __global__ void sum_partials_kernel(const float* partial, float* dweight, float* dbias, int64_t rows,
                                           int64_t width) {
  __shared__ float slices[SUM_SLICES][32];
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.0f;
  if (column < width) {
    const float* start = partial + blockIdx.y * rows * width + column;
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += SUM_SLICES) total += start[r * width];
  }
  slices[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int i = 1; i < SUM_SLICES; ++i) total += slices[i][threadIdx.x];
  float* sum = blockIdx.y == 0 ? dweight : dbias;
  if (sum != nullptr) sum[column] = total;
}

// 3 dtypes x 2 alignments = 6 builds of each pass of an op.
template <bool CENTER, bool ADD>
int norm_forward(const NormForward& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowShape shape(op.rows, op.width, sizeof(T));
    const bool aligned =
        are_aligned(op.width * int64_t(sizeof(T)), {op.x, op.residual, op.weight, op.bias, op.y, op.total});
    const auto kernel =
        aligned ? norm_forward_kernel<T, CENTER, ADD, true> : norm_forward_kernel<T, CENTER, ADD, false>;
    return launch(kernel, dim3(unsigned(shape.blocks)), shape.threads, 0, stream, op);
  });
}

// Blocks of the backward pass; each of a block's rows at a time has sums of its own.
struct BackwardShape : RowShape {
  BackwardShape(int64_t rows, int64_t width, Dtype dtype) : RowShape(rows, width, dtype == Dtype::float32 ? 4 : 2) {
    blocks = blocks < PARTIALS ? blocks : PARTIALS;
  }
  int64_t sums() const { return blocks * threads.y; }
};

inline size_t norm_backward_workspace(int64_t rows, int64_t width, Dtype dtype, bool center) {
  return size_t(BackwardShape(rows, width, dtype).sums() * width) * sizeof(float) * (center ? 2 : 1);
}

template <bool CENTER, bool ADD>
int norm_backward(NormBackward op, void* workspace, Stream stream) {
  const bool sums = op.dweight != nullptr || op.dbias != nullptr;
  op.partial = sums ? static_cast<float*>(workspace) : nullptr;
  const BackwardShape shape(op.rows, op.width, op.dtype);
  const int error = with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = are_aligned(op.width * int64_t(sizeof(T)), {op.dy, op.x, op.weight, op.dtotal, op.dx});
    const auto kernel =
        aligned ? norm_backward_kernel<T, CENTER, ADD, true> : norm_backward_kernel<T, CENTER, ADD, false>;
    return launch(kernel, dim3(unsigned(shape.blocks)), shape.threads, 0, stream, op);
  });
  if (error != cudaSuccess || !sums) return error;
  return launch(sum_partials_kernel, dim3(unsigned(ceil_div(op.width, 32)), CENTER ? 2 : 1), dim3(32, SUM_SLICES), 0,
                stream, op.partial, op.dweight, op.dbias, shape.sums(), op.width);
}

}  // namespace llmcore::cuda
