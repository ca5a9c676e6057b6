// rope: pairs of a head's elements turned by the angle of their position; back by the opposite one.
//
// A thread turns one vector of firsts and one of seconds (in the interleaved form, two neighbouring vectors of pairs)
// and copies what is not turned. Bound by memory: 2 elements moved an element, 128 bits at a time; the angles come
// from cache, where the heads of a position share them.
#include "launch.cuh"
#include "piece.cuh"

namespace llmcore::cuda {

template <typename T, typename A, int STEP, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rope_kernel(const Rope op) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= op.B * op.H * op.T) return;
  const int64_t t = row % op.T, h = row / op.T % op.H, b = row / op.T / op.H;
  const T* x = static_cast<const T*>(op.x) + b * op.x_strides[0] + h * op.x_strides[1] + t * op.x_strides[2];
  T* y = static_cast<T*>(op.y) + row * op.D;
  const int64_t angles = b * op.angle_batch_stride + t * op.half;
  const A* cosines = static_cast<const A*>(op.cos) + angles;
  const A* sines = static_cast<const A*>(op.sin) + angles;

  each_piece<STEP>(op.D - op.half, [&](int64_t first) {
    float a[STEP], b[STEP], cosine[STEP], sine[STEP];
    if (first >= op.half) {  // not turned
      load_piece(a, x + op.half + first);
      store_piece(y + op.half + first, a);
      return;
    }
    load_piece(cosine, cosines + first);
    load_piece(sine, sines + first);
    const int64_t one = INTERLEAVED ? 2 * first : first, other = INTERLEAVED ? one + STEP : op.half + first;
    load_piece(a, x + one);
    load_piece(b, x + other);
    float turned[2][STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      // Interleaved, a and b are 2 * STEP numbers one behind the other: pair i is numbers 2i and 2i + 1 of them.
      const int even = 2 * i, odd = 2 * i + 1;
      const float real = INTERLEAVED ? (even < STEP ? a[even % STEP] : b[even % STEP]) : a[i];
      const float imaginary = INTERLEAVED ? (odd < STEP ? a[odd % STEP] : b[odd % STEP]) : b[i];
      const float s = op.back ? -sine[i] : sine[i];
      turned[INTERLEAVED ? even / STEP : 0][INTERLEAVED ? even % STEP : i] = real * cosine[i] - imaginary * s;
      turned[INTERLEAVED ? odd / STEP : 1][INTERLEAVED ? odd % STEP : i] = imaginary * cosine[i] + real * s;
    }
    store_piece(y + one, turned[0]);
    store_piece(y + other, turned[1]);
  });
}

// 3 dtypes, 2 of them with float32 angles too, x 2 alignments x 2 forms = 20 builds.
int rope(const Rope& op, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto angle) {
      using A = decltype(angle);
      constexpr int WIDTH = Vector<T>::WIDTH;
      bool aligned = op.half % WIDTH == 0 && are_aligned(op.D * int64_t(sizeof(T)), {op.x, op.cos, op.sin, op.y});
      for (int64_t stride : op.x_strides) aligned = aligned && stride * int64_t(sizeof(T)) % 16 == 0;
      const PieceShape shape(op.B * op.H * op.T, aligned ? (op.D - op.half) / WIDTH : op.D - op.half);
      const auto kernel = aligned ? (op.interleaved ? rope_kernel<T, A, WIDTH, true> : rope_kernel<T, A, WIDTH, false>)
                                  : (op.interleaved ? rope_kernel<T, A, 1, true> : rope_kernel<T, A, 1, false>);
      return launch(kernel, shape.grid, shape.threads, 0, stream, op);
    };
    return op.angle_dtype == op.dtype ? run(zero) : run(float{});
  });
}

}  // namespace llmcore::cuda
