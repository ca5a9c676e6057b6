// What the kernels of attention share: which keys a query sees, and scores to weights.
//
// A query sees an interval of keys: causality, a window and the number of keys are its two ends, which grow with the
// query's position. So a block of queries meets an interval of blocks of keys, and only those at its ends are masked.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace llmcore::cuda {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int WARPS = 4;

__device__ inline float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr int FARTHEST = 1 << 29;  // positions and windows beyond count as this: their sums fit in an int

__device__ inline int near(int64_t x) { return int(x < -FARTHEST ? -FARTHEST : x < FARTHEST ? x : FARTHEST); }

// Which keys the queries of one sequence see: of row t those from `left` before its position, offset + t, to `right`
// behind it, an interval [low, high).
struct Keys {
  int offset, left, right, length;

  __device__ Keys(const AttentionProblem& p, int64_t b) {
    const int64_t given = p.kv_lengths == nullptr ? p.S : p.kv_lengths[b];
    length = int(given < 0 ? 0 : given < p.S ? given : p.S);
    offset = near(p.q_offsets != nullptr ? p.q_offsets[b] : p.q_offset != NO_OFFSET ? p.q_offset : length - p.T);
    left = p.window_left < 0 ? FARTHEST : near(p.window_left);
    right = p.causal ? 0 : p.window_right < 0 ? FARTHEST : near(p.window_right);
  }
  __device__ int inside(int key) const { return key < 0 ? 0 : key < length ? key : length; }
  __device__ int low(int64_t t) const { return inside(offset + int(t) - left); }
  __device__ int high(int64_t t) const { return inside(offset + int(t) + right + 1); }
  // Of a key and the row at t; `ahead` is key - t - offset.
  __device__ bool sees(int ahead, int key) const { return ahead >= -left && ahead <= right && key < length; }
};

// The blocks of keys that a block of queries meets; those in [whole_from, whole_to) all its rows see from end to end.
struct KeyBlocks {
  int first, end, whole_from, whole_to;

  __device__ KeyBlocks(const Keys& keys, int64_t first_row, int64_t last_row, int size)
      : first(keys.low(first_row) / size),
        end(int(ceil_div(keys.high(last_row), size))),
        whole_from(int(ceil_div(keys.low(last_row), size))),
        whole_to(keys.high(first_row) / size) {}
  __device__ bool cuts(int block) const { return block < whole_from || block >= whole_to; }
};

// Scores before masking become what 2 is raised to, but for a factor that `Scores::factor` is: with a softcap the
// scores are capped here, without one the scale is left to the exponent's multiply-add.
struct Scores {
  float factor, scale, softcap;

  __device__ explicit Scores(const AttentionProblem& p)
      : factor(p.softcap > 0.0f ? LOG2E : p.scale * LOG2E), scale(p.scale), softcap(p.softcap) {}

  // tanh by the exponential: the instruction tanh.approx is good to 2^-11 only.
  __device__ float tanh_of(float s) const {
    return 1.0f - __fdividef(2.0f, exp2_approximately(s * (2.0f * LOG2E * scale / softcap)) + 1.0f);
  }

  template <int M, int N>
  __device__ void cap(float (&s)[M][N][4]) const {
    if (softcap <= 0.0f) return;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = softcap * tanh_of(s[m][n][i]);
  }
};

// The largest of a lane's two columns and its three neighbours', who have the same row.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A row's largest score so far, and the sum of its weights relative to that, each lane its own columns'.
template <int M>
struct OnlineSoftmax {
  float maximum[M][2], sum[M][2];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[m][half] = -INFINITY, sum[m][half] = 0.0f;
  }

  // Scores to weights. `decay` is what sums so far must be multiplied by, as this one's are: they are relative to
  // the new maximum.
  template <int N>
  __device__ void weigh(float (&s)[M][N][4], float (&decay)[M][2], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = maximum[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        largest = quad_max(largest);
        const float base = largest == -INFINITY ? 0.0f : largest * factor;
        decay[m][half] = exp2_approximately(maximum[m][half] * factor - base);
        maximum[m][half] = largest;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_approximately(fmaf(s[m][n][i], factor, -base));
            added += s[m][n][i];
          }
        }
        sum[m][half] = fmaf(sum[m][half], decay[m][half], added);
      }
    }
  }

  template <int COLUMNS>
  __device__ static void scale(float (&out)[M][COLUMNS][4], const float (&decay)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] *= decay[m][i / 2];
  }

  // What the result must be multiplied by, and lse of the rows below `valid`; lse is that of this warp's first row.
  __device__ void finish(float (&inverse)[M][2], float* lse, int valid, float factor, int lane) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[m][half]);
        const int row = 16 * m + 8 * half + lane / 4;
        inverse[m][half] = total == 0.0f ? 0.0f : 1.0f / total;
        if (lane % 4 == 0 && row < valid) {
          lse[row] = total == 0.0f ? -INFINITY : (maximum[m][half] * factor + log2f(total)) / LOG2E;
        }
      }
    }
  }
};

// What lies outside of the rows' intervals becomes `outside`. c (16 M rows x 8 N keys): rows from `row` on and keys
// from `first_key` on; TRANSPOSED, (16 M keys x 8 N rows). The same of `more` arrays of that shape.
template <bool TRANSPOSED, int M, int N, typename... More>
__device__ void mask_outside(float (&c)[M][N][4], const Keys& keys, int64_t row, int first_key, float outside, int lane,
                             More&... more) {
  const int ahead = first_key - int(row) - keys.offset;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int down = 16 * m + 8 * (i / 2) + lane / 4, across = 8 * n + 2 * (lane % 4) + i % 2;
        const int key = TRANSPOSED ? down : across, t = TRANSPOSED ? across : down;
        if (keys.sees(ahead + key - t, first_key + key)) continue;
        c[m][n][i] = outside;
        ((more[m][n][i] = outside), ...);
      }
    }
  }
}

inline bool takes_tensor_cores(const AttentionProblem& p) {
  return p.dtype != Dtype::float32 && p.D == p.Dv && (p.D == 64 || p.D == 128);
}

// Calls body<T, D> of a problem that takes_tensor_cores: 2 dtypes x 2 widths = 4 builds.
template <typename Body>
int with_type_and_width(const AttentionProblem& p, Body body) {
  const auto with_width = [&](auto zero) {
    if (p.D == 64) return body(zero, std::integral_constant<int, 64>{});
    return body(zero, std::integral_constant<int, 128>{});
  };
  return p.dtype == Dtype::bfloat16 ? with_width(bfloat16{}) : with_width(float16{});
}

}  // namespace llmcore::cuda
