// A library of its own: these are not ops of the registry, and nothing differentiates or compiles them.
#include "../register.h"

namespace llmcore {
namespace {

float* result_of(const Tensor& result) {
  STD_TORCH_CHECK(
      result.scalar_type() == ScalarType::Float && result.is_contiguous() && result.numel() >= runtime.threads(),
      "result: expected a contiguous float32 for each thread");
  return static_cast<float*>(result.mutable_data_ptr());
}

void check_floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  ": expected a contiguous float32 tensor");
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

int64_t fma(int64_t level, int64_t rounds, const Tensor& result) {
  int64_t operations = 0;
  // v = v * 0.999 + 0.001 stays at 1.
  check_scratch(kernels_of(level).roofline_fma({result_of(result), &operations, rounds, 0.999f, 0.001f}));
  return operations;
}

int64_t bf16_pairs(int64_t level, int64_t rounds, const Tensor& result) {
  int64_t operations = 0;
  // The bits of 1 are the bfloat16 pair (0, 1), those of 2^-100 the pair (0, 2^-100): a product too small to add up.
  check_scratch(kernels_of(level).roofline_bf16_pairs({result_of(result), &operations, rounds, 1.0f, 0x1p-100f}));
  return operations;
}

void read(int64_t level, const Tensor& x, int64_t passes, const Tensor& result) {
  check_floats(x, "x");
  check_scratch(kernels_of(level).roofline_read(
      {static_cast<const float*>(x.const_data_ptr()), result_of(result), x.numel(), passes}));
}

void copy(int64_t level, const Tensor& x, int64_t passes, bool past_caches, const Tensor& out) {
  check_floats(x, "x");
  check_same(out, x, "out", "x");
  void* y = out.mutable_data_ptr();
  STD_TORCH_CHECK(!past_caches || is_aligned(y), "out: expected memory aligned to 64 bytes");
  check_scratch(kernels_of(level).roofline_copy(
      {static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y), x.numel(), passes, past_caches}));
}

}  // namespace

STABLE_TORCH_LIBRARY(llmcore_roofline, m) {
  m.def("fma(int level, int rounds, Tensor(a!) result) -> int");
  m.def("bf16_pairs(int level, int rounds, Tensor(a!) result) -> int");
  m.def("read(int level, Tensor x, int passes, Tensor(a!) result) -> ()");
  m.def("copy(int level, Tensor x, int passes, bool past_caches, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore_roofline, CPU, m) {
  m.impl("fma", TORCH_BOX(&fma));
  m.impl("bf16_pairs", TORCH_BOX(&bf16_pairs));
  m.impl("read", TORCH_BOX(&read));
  m.impl("copy", TORCH_BOX(&copy));
}

}  // namespace llmcore
