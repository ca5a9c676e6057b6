// swiglu: y = silu(gate) * up, and its gradients, elementwise. Bound by memory: 3 elements moved an element forward, 5
// backward, 128 bits at a time; the arithmetic is one exponential.
#include "launch.cuh"
#include "piece.cuh"

namespace llmcore::cuda {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

template <typename T, int STEP>
__global__ void __launch_bounds__(THREADS) swiglu_forward_kernel(const GatedForward op) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= op.rows) return;  // forward
  const T* gate = static_cast<const T*>(op.gate) + row * op.gate_stride;
  const T* up = static_cast<const T*>(op.up) + row * op.up_stride;
  T* y = static_cast<T*>(op.y) + row * op.width;
  each_piece<STEP>(op.width, [&](int64_t first) {
    float g[STEP], u[STEP];
    load_piece(g, gate + first);
    load_piece(u, up + first);
#pragma unroll
    for (int i = 0; i < STEP; ++i) g[i] = g[i] * sigmoid(g[i]) * u[i];
    store_piece(y + first, g);
  });
}

template <typename T, int STEP>
__global__ void __launch_bounds__(THREADS) swiglu_backward_kernel(const GatedBackward op) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= op.rows) return;
  const T* gate = static_cast<const T*>(op.gate) + row * op.gate_stride;
  const T* up = static_cast<const T*>(op.up) + row * op.up_stride;
  const int64_t start = row * op.width;
  each_piece<STEP>(op.width, [&](int64_t first) {
    float g[STEP], u[STEP], dy[STEP];
    load_piece(g, gate + first);
    load_piece(u, up + first);
    load_piece(dy, static_cast<const T*>(op.dy) + start + first);
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const float s = sigmoid(g[i]), silu = g[i] * s;
      g[i] = dy[i] * u[i] * s * (1.0f + g[i] - silu);
      u[i] = dy[i] * silu;
    }
    store_piece(static_cast<T*>(op.dgate) + start + first, g);
    store_piece(static_cast<T*>(op.dup) + start + first, u);
  });
}

template <typename T, typename Op>
bool rows_aligned(const Op& op) {
  return op.gate_stride * int64_t(sizeof(T)) % 16 == 0 && op.up_stride * int64_t(sizeof(T)) % 16 == 0;
}

// 3 dtypes x 2 alignments = 6 builds of each pass.
int swiglu_forward(const GatedForward& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int WIDTH = Vector<T>::WIDTH;
    const bool aligned = rows_aligned<T>(op) && are_aligned(op.width * int64_t(sizeof(T)), {op.gate, op.up, op.y});
    const PieceShape shape(op.rows, aligned ? op.width / WIDTH : op.width);
    const auto kernel = aligned ? swiglu_forward_kernel<T, WIDTH> : swiglu_forward_kernel<T, 1>;
    return launch(kernel, shape.grid, shape.threads, 0, stream, op);
  });
}

int swiglu_backward(const GatedBackward& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int WIDTH = Vector<T>::WIDTH;
    const bool aligned =
        rows_aligned<T>(op) && are_aligned(op.width * int64_t(sizeof(T)), {op.dy, op.gate, op.up, op.dgate, op.dup});
    const PieceShape shape(op.rows, aligned ? op.width / WIDTH : op.width);
    const auto kernel = aligned ? swiglu_backward_kernel<T, WIDTH> : swiglu_backward_kernel<T, 1>;
    return launch(kernel, shape.grid, shape.threads, 0, stream, op);
  });
}

}  // namespace llmcore::cuda
