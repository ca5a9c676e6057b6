// softmax over the last axis: a row belongs to a warp or a block and stays in registers, so each element is read once
// and written once. Bound by memory: 2 elements moved an element forward, 3 backward, 128 bits at a time.
#include "launch.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace llmcore::cuda {

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(FORWARD_THREADS) softmax_forward_kernel(const SoftmaxForward op) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= op.rows) return;
  const int width = int(op.width);
  Row<T, ALIGNED> row;
  row.load(static_cast<const T*>(op.x) + index * op.width, width);
  __shared__ ReduceRoom<1> maximum_room, sum_room;

  float maximum = -INFINITY, sum = 0.0f;
  row.each(width, [&](int k, int i) { maximum = fmaxf(maximum, row.at(k, i)); });
  maximum = reduce_row<Maximum>(maximum, maximum_room);
  row.each(width, [&](int k, int i) { sum += __expf(row.at(k, i) - maximum); });
  const float inverse = 1.0f / reduce_row<Sum>(sum, sum_room);

  row.change([&](int, float (&x)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = __expf(x[i] - maximum) * inverse;
  });
  row.store(static_cast<T*>(op.y) + index * op.width, width);
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(FORWARD_THREADS) softmax_backward_kernel(const SoftmaxBackward op) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= op.rows) return;
  const int width = int(op.width);
  Row<T, ALIGNED> y, dy;
  y.load(static_cast<const T*>(op.y) + index * op.width, width);
  dy.load(static_cast<const T*>(op.dy) + index * op.width, width);
  __shared__ ReduceRoom<1> room;

  float along = 0.0f;
  y.each(width, [&](int k, int i) { along += dy.at(k, i) * y.at(k, i); });
  along = reduce_row<Sum>(along, room);

  dy.change([&](int k, float (&x)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = y.at(k, i) * (x[i] - along);
  });
  dy.store(static_cast<T*>(op.dx) + index * op.width, width);
}

// 3 dtypes x 2 alignments = 6 builds of each pass.
int softmax_forward(const SoftmaxForward& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowShape shape(op.rows, op.width, sizeof(T));
    const bool aligned = are_aligned(op.width * int64_t(sizeof(T)), {op.x, op.y});
    const auto kernel = aligned ? softmax_forward_kernel<T, true> : softmax_forward_kernel<T, false>;
    return launch(kernel, dim3(unsigned(shape.blocks)), shape.threads, 0, stream, op);
  });
}

int softmax_backward(const SoftmaxBackward& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowShape shape(op.rows, op.width, sizeof(T));
    const bool aligned = are_aligned(op.width * int64_t(sizeof(T)), {op.dy, op.y, op.dx});
    const auto kernel = aligned ? softmax_backward_kernel<T, true> : softmax_backward_kernel<T, false>;
    return launch(kernel, dim3(unsigned(shape.blocks)), shape.threads, 0, stream, op);
  });
}

}  // namespace llmcore::cuda
