// What the files of the attention family share: checks, strides, and the options of a problem.
#pragma once

#include "../register.h"

namespace llmcore {

// The arguments that an AttentionProblem has besides q, k and v, in the order of attention's schema.
struct AttentionOptions {
  OptionalTensor mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed;
  std::optional<int64_t> q_offset;
  bool causal;
  int64_t window_left, window_right;
  double scale, softcap, dropout_p;
};

inline void check_heads(const Tensor& t, int64_t axes, const char* name) {
  STD_TORCH_CHECK(t.dim() == axes, name, ": expected ", axes, " axes");
  const bool contiguous = t.numel() == 0 || t.size(axes - 1) == 1 || t.stride(axes - 1) == 1;
  STD_TORCH_CHECK(contiguous, name, ": expected a contiguous last axis");
}

// The tensor itself when its last axis is contiguous, as the kernels want it, else a contiguous copy.
inline Tensor with_contiguous_heads(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return last >= 0 && t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

// The same; on a GPU each row must start at a multiple of 16 bytes too.
inline Tensor with_heads(const Tensor& t) {
  bool aligned = !is_cuda(t) || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim() && is_cuda(t); ++i) aligned = aligned && t.stride(i) % 8 == 0;
  return aligned ? with_contiguous_heads(t) : torch::stable::clone(torch::stable::contiguous(t));
}

inline void set_strides(int64_t (&strides)[3], const Tensor& t) {
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

inline const int64_t* integers_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.scalar_type() == ScalarType::Long && t.is_contiguous(), name,
                  ": expected a contiguous int64 tensor of ", count, " numbers");
  return static_cast<const int64_t*>(t.const_data_ptr());
}
inline const int64_t* integers_of(const OptionalTensor& t, int64_t count, const char* name) {
  return t.has_value() ? integers_of(*t, count, name) : nullptr;
}

inline void set_mask(AttentionProblem& p, const OptionalTensor& mask) {
  if (!mask.has_value()) return;
  const int64_t full[4] = {p.B, p.H, p.T, p.S};
  STD_TORCH_CHECK(mask->dim() == 4, "mask: expected 4 axes");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask->size(i) == full[i] || mask->size(i) == 1, "mask: axis ", i, " does not broadcast");
    p.mask_strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  p.mask = mask->const_data_ptr();
  p.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
  if (!p.mask_is_bool) p.mask_dtype = dtype_of(*mask, "mask");
}

inline const float* floats_at(const OptionalTensor& t, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, name, ": expected float32");
  return static_cast<const float*>(t->const_data_ptr());
}

// q, k and v of a problem whose sizes are set: all of one dtype.
inline void set_tensors(AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "q: expected a multiple of k's heads");
  p.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "k, v: expected q's dtype");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
}

inline const float* scales_of(const OptionalTensor& t, const Tensor& rows, int64_t (&strides)[3], const char* name) {
  STD_TORCH_CHECK(t.has_value() && t->dim() == 3, name, ": expected a tensor of 3 axes");
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(t->size(i) == rows.size(i), name, ": expected one for each row of the integers");
  }
  set_strides(strides, *t);
  return floats_at(t, name);
}

// The same where a cache may be in fewer bits: k and v of q's dtype, or beside a float32 q in bfloat16, or in int8 with
// scales.
inline void set_cache_tensors(AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const ScalarType type = k.scalar_type();
  const bool is_int8 = type == ScalarType::Char, is_bfloat16 = type == ScalarType::BFloat16;
  if (q.scalar_type() != ScalarType::Float || v.scalar_type() != type || !(is_int8 || is_bfloat16)) {
    return set_tensors(p, q, k, v);
  }
  set_tensors(p, q, q, q);
  p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.kv_dtype = is_int8 ? KvDtype::int8 : KvDtype::bfloat16;
  if (!is_int8) return;
  p.k_scale = scales_of(k_scale, k, p.k_scale_strides, "k_scale");
  p.v_scale = scales_of(v_scale, v, p.v_scale_strides, "v_scale");
}

// The rest of it. The tensors must outlive the problem.
inline void set_options(AttentionProblem& p, const AttentionOptions& o) {
  set_mask(p, o.mask);
  p.kv_lengths = integers_of(o.kv_lengths, p.B, "kv_lengths");
  p.q_offsets = integers_of(o.q_offsets, p.B, "q_offset");
  p.q_offset = o.q_offset.value_or(NO_OFFSET);
  p.causal = o.causal;
  p.window_left = o.window_left, p.window_right = o.window_right;
  p.scale = float(o.scale), p.softcap = float(o.softcap);
  p.sinks = floats_at(o.sinks, "sinks");
  // Not by the pointers: those of an empty tensor are null too.
  STD_TORCH_CHECK(!o.sinks.has_value() || (o.sinks->numel() == p.H && o.sinks->is_contiguous()),
                  "sinks: expected a contiguous tensor of shape (H)");
  p.alibi_slopes = floats_at(o.alibi_slopes, "alibi_slopes");
  if (o.alibi_slopes.has_value()) {
    const int64_t axes = o.alibi_slopes->dim();
    STD_TORCH_CHECK(
        (axes == 1 || (axes == 2 && o.alibi_slopes->size(0) == p.B)) && o.alibi_slopes->size(axes - 1) == p.H,
        "alibi_slopes: expected shape (H) or (B, H)");
    p.alibi_strides[0] = axes == 2 ? o.alibi_slopes->stride(0) : 0;
    p.alibi_strides[1] = o.alibi_slopes->stride(axes - 1);
  }
  STD_TORCH_CHECK(
      o.dropout_p == 0 || (o.seed.has_value() && o.seed->numel() == 1 && o.seed->scalar_type() == ScalarType::Long),
      "seed: expected one int64 with dropout");
  STD_TORCH_CHECK(o.dropout_p >= 0 && o.dropout_p < 1, "dropout_p: expected 0 or more and below 1, got ", o.dropout_p);
  if (o.dropout_p > 0) {
    p.dropout_threshold = uint32_t(o.dropout_p * 4294967296.0);
    p.dropout_seed = *static_cast<const uint64_t*>(o.seed->const_data_ptr());
  }
}

// (B, heads, positions, width) in memory order (B, positions, heads, width), which models turn into (B, T, C) for free.
inline Tensor fresh_heads(const Tensor& like, int64_t heads, int64_t positions, int64_t width) {
  return fresh({like.size(0), heads, positions, width}, {positions * heads * width, width, heads * width, 1},
               like.scalar_type(), place_of(like));
}

}  // namespace llmcore
