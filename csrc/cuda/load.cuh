// Numbers of three dtypes in float32, and memory in 16-byte pieces.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../ops.h"

namespace llmcore::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float16 x) { return __half2float(x); }

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline float16 narrow<float16>(float x) {
  return __float2half_rn(x);
}

// Two numbers in one register, low half first, by the one instruction that converts both.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// As many elements as 16 bytes hold: what one load or store moves.
template <typename T>
struct alignas(16) Vector {
  static constexpr int WIDTH = 16 / int(sizeof(T));
  T values[WIDTH];
};

template <typename T>
__device__ Vector<T> load_vector(const T* address) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(address);
  return v;
}

// To global memory. By the instruction itself: where nvcc cannot tell two stores apart, it writes 4 bytes at a time.
template <typename T>
__device__ void store_vector(T* address, const Vector<T>& v) {
  const uint4 bits = *reinterpret_cast<const uint4*>(&v);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
}

template <typename T>
__device__ Vector<T> narrow_vector(const float (&x)[Vector<T>::WIDTH]) {
  Vector<T> v;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < Vector<T>::WIDTH; ++i) v.values[i] = x[i];
  } else {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < Vector<T>::WIDTH / 2; ++i) pairs[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return v;
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline bool are_aligned(int64_t row_bytes, std::initializer_list<const void*> pointers) {
  bool aligned = row_bytes % 16 == 0;
  for (const void* pointer : pointers) aligned = aligned && is_aligned(pointer);
  return aligned;
}

// Calls body with a value of the type that a dtype code stands for.
template <typename Body>
int with_type(Dtype dtype, Body body) {
  if (dtype == Dtype::bfloat16) return body(bfloat16{});
  if (dtype == Dtype::float16) return body(float16{});
  return body(float{});
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llmcore::cuda
