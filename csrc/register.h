// How an op's file in register/ reads tensors: checks that keep a kernel inside its memory, and dtype codes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "huge_pages.h"
#include "levels.h"

namespace llmcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": the native kernels take float32, bfloat16 or float16");
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  if (type == ScalarType::Half) return Dtype::float16;
  return Dtype::float32;
}

inline const Kernels& kernels_of(int64_t level) {
  const Kernels* kernels = kernels_at(level);
  STD_TORCH_CHECK(kernels != nullptr, "level ", level, " does not run on this machine");
  return *kernels;
}

// Where a tensor is. A build without CUDA does not ask: there is one place.
struct Place {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
};

#ifdef LLMCORE_CUDA
// The CUDA kernels, queued on the current stream of a device; those that there are none of are null.
const Kernels& cuda_kernels(int32_t device);

inline Place place_of(const Tensor& t) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &place.index));
  return place;
}
inline bool is_cuda(const Tensor& t) { return place_of(t).type == aoti_torch_device_type_cuda(); }

// The kernels for where a tensor is; `level` is the CPU's.
inline const Kernels& kernels_of(int64_t level, const Tensor& on) {
  return is_cuda(on) ? cuda_kernels(place_of(on).index) : kernels_of(level);
}
#define LLMCORE_CUDA_IMPL(implement) \
  STABLE_TORCH_LIBRARY_IMPL(llmcore, CUDA, m) { implement(m); }
#else
inline Place place_of(const Tensor&) { return {}; }
inline bool is_cuda(const Tensor&) { return false; }
inline const Kernels& kernels_of(int64_t level, const Tensor&) { return kernels_of(level); }
#define LLMCORE_CUDA_IMPL(implement)
#endif

inline void check_scratch(bool ok) { STD_TORCH_CHECK(ok, "out of memory for a kernel's scratch space"); }

// The tensor itself when it is contiguous, else a contiguous copy.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// (rows, width) of a tensor seen as rows along its last axis.
struct Rows {
  int64_t rows, width;
};
inline Rows rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 1, name, ": expected at least 1 axis, got a scalar");
  const int64_t width = t.size(t.dim() - 1);
  return {width == 0 ? 0 : t.numel() / width, width};
}

// `t` has the shape and dtype of `like`, whatever its strides.
inline bool is_alike(const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim() && t.scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  return same;
}
inline void check_alike(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(is_alike(t, like), name, ": expected the shape and dtype of ", like_name);
}
inline void check_same(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(is_alike(t, like) && t.is_contiguous(), name,
                  ": expected a contiguous tensor of the shape and dtype of ", like_name);
}

// A contiguous vector of `width` parameters, its pointer and dtype; nothing when it is absent.
struct Parameter {
  Parameter(const OptionalTensor& t, int64_t width, const char* name) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == width, name, ": expected shape (", width, ")");
    held = as_contiguous(*t);
    data = held->const_data_ptr();
    dtype = dtype_of(*held, name);
  }
  OptionalTensor held;
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// Of bytes: from here on the C library as a rule maps each tensor anew, and the system clears its pages.
constexpr int64_t LARGE_RESULT = int64_t{32} << 20;

// A fresh tensor, `strides` in elements. By the C shim itself: the dispatcher's new_empty takes a microsecond more.
inline Tensor fresh(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t type, Place place = {}) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(axes, sizes, strides, type, place.type, place.index, &handle));
  const Tensor made(handle);
  const int64_t bytes = made.numel() * int64_t(aoti_torch_dtype_element_size(type));
  if (bytes >= LARGE_RESULT && place.type == aoti_torch_device_type_cpu()) {
    ask_for_huge_pages(made.mutable_data_ptr(), bytes);
  }
  return made;
}
inline int32_t code_of(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}
template <size_t N>
Tensor fresh(const int64_t (&sizes)[N], const int64_t (&strides)[N], ScalarType type, Place place = {}) {
  return fresh(int64_t(N), sizes, strides, code_of(type), place);
}

// The same, contiguous, of any number of axes.
inline Tensor fresh(const std::vector<int64_t>& sizes, ScalarType type, Place place = {}) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return fresh(int64_t(sizes.size()), sizes.data(), strides.data(), code_of(type), place);
}

// A fresh contiguous tensor of the shape, dtype and place of another, or an empty one when it is not wanted.
inline Tensor fresh_like(const Tensor& like, bool wanted = true) {
  if (!wanted) return fresh({0}, {1}, like.scalar_type(), place_of(like));
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  STD_TORCH_CHECK(like.is_contiguous(), "fresh_like: expected a contiguous tensor");
  return fresh(like.dim(), like.sizes().data(), like.strides().data(), type, place_of(like));
}

// The same for a tensor of any strides.
inline Tensor fresh_contiguous(const Tensor& like) {
  return fresh(std::vector<int64_t>(like.sizes().begin(), like.sizes().end()), like.scalar_type(), place_of(like));
}

// A tensor of any shape as rows along its last axis, one stride apart: itself where its strides allow that (halves of
// one tensor), else a contiguous copy. A scalar is one row of one.
struct StridedRows {
  explicit StridedRows(const Tensor& t) : held(can_stay(t) ? t : torch::stable::contiguous(t)) {
    const int64_t axes = held.dim();
    width = axes == 0 ? 1 : held.size(axes - 1);
    rows = width == 0 ? 0 : held.numel() / width;
    stride = width;
    for (int64_t i = axes - 2; i >= 0; --i) {
      if (held.size(i) == 1) continue;
      stride = held.stride(i);
      break;
    }
    data = held.const_data_ptr();
  }

  static bool can_stay(const Tensor& t) {
    const int64_t axes = t.dim();
    if (axes > 0 && t.size(axes - 1) != 1 && t.stride(axes - 1) != 1) return false;
    int64_t expected = -1;
    for (int64_t i = axes - 2; i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (expected >= 0 && t.stride(i) != expected) return false;
      expected = t.stride(i) * t.size(i);
    }
    return true;
  }

  Tensor held;
  const void* data;
  int64_t rows, width, stride;
};

// A fresh float32 vector of `width`, or an empty one when it is not wanted.
inline Tensor float_vector(bool wanted, int64_t width, Place place = {}) {
  return fresh({wanted ? width : 0}, {1}, ScalarType::Float, place);
}
inline float* floats_of(const Tensor& t, bool wanted) {
  return wanted ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace llmcore
