// The native ops: every signature with its shapes. The table of contents of csrc/.
//
// Framework-free: pointers, sizes, strides in elements, dtype codes. The caller allocates every output. A body lives in
// cpu/<op>.cpp, is compiled once per instruction-set level (LLMCORE_LEVELS) into a namespace of that name, and is
// reached through the level's Kernels table. Statistics and reductions are float32.
#pragma once

#include <cstdint>

namespace llmcore {

// A level is an instruction set with the number of float32 lanes its vectors have. Best last.
#if defined(__x86_64__)
#define LLMCORE_LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define LLMCORE_LEVELS(X) X(portable)
#endif

enum class Dtype : int32_t { float32, bfloat16, float16 };

// What a kernel needs from its host: threads and scratch memory. Set once, by whoever loads the kernels.
struct Runtime {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on disjoint ranges that cover [0, count), on several threads when count > grain.
  void (*parallel_for)(int64_t count, int64_t grain, Body body, void* context);
  int64_t (*threads)();
};
extern Runtime runtime;

// y = x / sqrt(mean(x^2) + eps) * weight over the last axis. x, y (rows, width), contiguous; weight (width) or null.
struct RmsNormForward {
  const void* x;
  const void* weight;
  void* y;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// dx (rows, width) and dweight (width, float32) of the above; each may be null when it is not wanted.
struct RmsNormBackward {
  const void* dy;
  const void* x;
  const void* weight;
  void* dx;
  float* dweight;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// The bodies of one level. Each returns false when scratch memory could not be had, true otherwise.
struct Kernels {
  bool (*rms_norm_forward)(const RmsNormForward&);
  bool (*rms_norm_backward)(const RmsNormBackward&);
};

#define LLMCORE_DECLARE_LEVEL(level) \
  namespace level {                  \
  extern const Kernels kernels;      \
  }
LLMCORE_LEVELS(LLMCORE_DECLARE_LEVEL)
#undef LLMCORE_DECLARE_LEVEL

}  // namespace llmcore
