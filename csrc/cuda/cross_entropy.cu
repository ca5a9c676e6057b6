// cross_entropy: a block walks over a row of logits once, with a running maximum and sum in each thread.
//
// Rows of any width: the elements before the first multiple of 16 bytes and behind the last are loaded one by one, all
// others 128 bits at a time. Bound by memory: forward reads each logit once, backward reads and writes it once. The
// losses of the rows are added in a fixed order by one block, the non-ignored ones counted: no atomics.
#include "launch.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace llmcore::cuda {

constexpr int ROW_THREADS = 256;
constexpr int SUM_THREADS = 1024;

// vector(first, elements) for the aligned middle of a row, element(index) for its ends; a block shares the row.
// `apart`: the row that is written lies elsewhere between multiples of 16 bytes, so that all of it goes element by
// element.
template <typename T, typename OnVector, typename OnElement>
__device__ void walk(const T* row, int64_t width, bool apart, OnVector vector, OnElement element) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int64_t misplaced = int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  int64_t head = apart ? width : (WIDTH - misplaced) % WIDTH;
  head = head < width ? head : width;
  const int64_t vectors = (width - head) / WIDTH, tail = head + vectors * WIDTH;
  for (int64_t i = threadIdx.x; i < head; i += blockDim.x) element(i);
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    vector(head + i * WIDTH, load_vector(row + head + i * WIDTH));
  }
  if (tail + threadIdx.x < width) element(tail + threadIdx.x);
}

// exp(x - maximum) summed, the maximum moving up as larger numbers come.
struct RunningSum {
  float maximum = -INFINITY, sum = 0.0f, plain = 0.0f;

  __device__ void raise(float candidate) {
    if (candidate > maximum) {
      sum *= __expf(maximum - candidate);
      maximum = candidate;
    }
  }
  __device__ void add(float x) {
    sum += x == -INFINITY && maximum == -INFINITY ? 0.0f : __expf(x - maximum);
    plain += x;
  }
};

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    cross_entropy_forward_kernel(const CrossEntropyForward op, float* losses) {
  const int64_t row = blockIdx.x, target = op.target[row];
  if (target == op.ignore_index) {
    if (threadIdx.x == 0) losses[row] = op.statistics[2 * row] = op.statistics[2 * row + 1] = 0.0f;
    return;
  }
  if (target < 0 || target >= op.classes) __trap();  // as torch: there is no logit to read
  const T* logits = static_cast<const T*>(op.logits) + row * op.classes;
  RunningSum running;
  walk(
      logits, op.classes, false,
      [&](int64_t, const Vector<T>& v) {
        float largest = widen(v.values[0]);
#pragma unroll
        for (int i = 1; i < Vector<T>::WIDTH; ++i) largest = fmaxf(largest, widen(v.values[i]));
        running.raise(largest);
#pragma unroll
        for (int i = 0; i < Vector<T>::WIDTH; ++i) running.add(widen(v.values[i]));
      },
      [&](int64_t i) {
        running.raise(widen(logits[i]));
        running.add(widen(logits[i]));
      });

  __shared__ ReduceRoom<1> maximum_room;
  __shared__ ReduceRoom<2> sum_room;
  const float maximum = reduce_row<Maximum>(running.maximum, maximum_room);
  float sums[2] = {running.maximum == -INFINITY ? running.sum : running.sum * __expf(running.maximum - maximum),
                   running.plain};
  reduce_row<Sum>(sums, sum_room);
  if (threadIdx.x != 0) return;
  const float log_sum = logf(sums[0]), whole = maximum + log_sum;
  op.statistics[2 * row] = maximum;
  op.statistics[2 * row + 1] = log_sum;
  float loss = whole - widen(logits[target]);
  if (op.label_smoothing > 0.0f) {
    const float even = whole - sums[1] / float(op.classes);
    loss = (1.0f - op.label_smoothing) * loss + op.label_smoothing * even;
  }
  losses[row] = loss;
}

// One block: the rows' losses as they are, added, or divided by how many count.
template <typename T>
__global__ void __launch_bounds__(SUM_THREADS)
    cross_entropy_sum_kernel(const CrossEntropyForward op, const float* losses) {
  T* loss = static_cast<T*>(op.loss);
  if (op.reduction == Reduction::none) {
    for (int64_t r = threadIdx.x; r < op.rows; r += blockDim.x) loss[r] = narrow<T>(losses[r]);
    return;
  }
  float sums[2] = {0.0f, 0.0f};
  for (int64_t r = threadIdx.x; r < op.rows; r += blockDim.x) {
    sums[0] += losses[r];
    sums[1] += op.target[r] == op.ignore_index ? 0.0f : 1.0f;
  }
  __shared__ ReduceRoom<2> room;
  reduce_row<Sum>(sums, room);
  if (threadIdx.x == 0) *loss = narrow<T>(op.reduction == Reduction::mean ? sums[0] / sums[1] : sums[0]);
}

// One block: how many rows count. Exact up to 2^24 rows a thread.
static __global__ void __launch_bounds__(SUM_THREADS)
    count_targets_kernel(const CrossEntropyBackward op, float* count) {
  float rows = 0.0f;
  for (int64_t r = threadIdx.x; r < op.rows; r += blockDim.x) rows += op.target[r] == op.ignore_index ? 0.0f : 1.0f;
  __shared__ ReduceRoom<1> room;
  rows = reduce_row<Sum>(rows, room);
  if (threadIdx.x == 0) *count = rows;
}

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    cross_entropy_backward_kernel(const CrossEntropyBackward op, const float* count) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int64_t row = blockIdx.x, target = op.target[row];
  const T* logits = static_cast<const T*>(op.logits) + row * op.classes;
  T* dlogits = static_cast<T*>(op.dlogits) + row * op.classes;
  const bool apart = (reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(dlogits)) % 16 != 0;
  const bool ignored = target == op.ignore_index;
  float scale = widen(static_cast<const T*>(op.dloss)[op.reduction == Reduction::none ? row : 0]);
  if (op.reduction == Reduction::mean) scale /= *count;
  const float maximum = op.statistics[2 * row], log_sum = op.statistics[2 * row + 1];
  const float even = op.label_smoothing / float(op.classes), peak = 1.0f - op.label_smoothing;
  const auto gradient = [&](int64_t i, float x) {
    if (ignored) return 0.0f;
    return (__expf(x - maximum - log_sum) - even - (i == target ? peak : 0.0f)) * scale;
  };
  walk(
      logits, op.classes, apart,
      [&](int64_t first, const Vector<T>& v) {
        float x[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) x[i] = gradient(first + i, widen(v.values[i]));
        store_vector(dlogits + first, narrow_vector<T>(x));
      },
      [&](int64_t i) { dlogits[i] = narrow<T>(gradient(i, widen(logits[i]))); });
}

size_t cross_entropy_forward_workspace(const CrossEntropyForward& op) { return size_t(op.rows) * sizeof(float); }

// 3 dtypes = 3 builds of each kernel.
int cross_entropy_forward(const CrossEntropyForward& op, void* workspace, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    float* losses = static_cast<float*>(workspace);
    const int error =
        launch(cross_entropy_forward_kernel<T>, dim3(unsigned(op.rows)), dim3(ROW_THREADS), 0, stream, op, losses);
    if (error != cudaSuccess) return error;
    return launch(cross_entropy_sum_kernel<T>, dim3(1), dim3(SUM_THREADS), 0, stream, op, losses);
  });
}

size_t cross_entropy_backward_workspace(const CrossEntropyBackward&) { return sizeof(float); }

int cross_entropy_backward(const CrossEntropyBackward& op, void* workspace, Stream stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    float* count = static_cast<float*>(workspace);
    const int error = launch(count_targets_kernel, dim3(1), dim3(SUM_THREADS), 0, stream, op, count);
    if (error != cudaSuccess) return error;
    return launch(cross_entropy_backward_kernel<T>, dim3(unsigned(op.rows)), dim3(ROW_THREADS), 0, stream, op, count);
  });
}

}  // namespace llmcore::cuda
