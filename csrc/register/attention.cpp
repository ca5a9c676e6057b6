#include "../register.h"

namespace llmcore {
namespace {

// The arguments that both passes share, in the order of their schemas.
struct Options {
  OptionalTensor mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed;
  std::optional<int64_t> q_offset;
  bool causal;
  int64_t window_left, window_right;
  double scale, softcap, dropout_p;
};

void check_heads(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 axes");
  STD_TORCH_CHECK(t.size(3) <= 1 || t.stride(3) == 1, name, ": expected a contiguous last axis");
}

// The tensor itself when its last axis is contiguous, as the kernels want it, else a contiguous copy.
Tensor with_contiguous_heads(const Tensor& t) {
  return t.dim() == 4 && t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

void set_strides(int64_t (&strides)[3], const Tensor& t) {
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

const int64_t* lengths_of(const OptionalTensor& t, int64_t batch, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == batch && t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                  name, ": expected a contiguous int64 tensor of shape (B)");
  return static_cast<const int64_t*>(t->const_data_ptr());
}

void set_mask(AttentionProblem& p, const OptionalTensor& mask) {
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

const float* floats_at(const OptionalTensor& t, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, name, ": expected float32");
  return static_cast<const float*>(t->const_data_ptr());
}

// q, k, v must have contiguous last axes and outlive the problem.
AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  AttentionProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3);
  p.G = k.size(1), p.S = k.size(2), p.Dv = v.size(3);
  STD_TORCH_CHECK(k.size(0) == p.B && v.size(0) == p.B, "k, v: expected the batch size of q");
  STD_TORCH_CHECK(k.size(3) == p.D, "k: expected the head width of q");
  STD_TORCH_CHECK(v.size(1) == p.G && v.size(2) == p.S, "v: expected the heads and positions of k");
  STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "q: expected a multiple of k's heads");
  p.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "k, v: expected q's dtype");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  set_strides(p.q_strides, q);
  set_strides(p.k_strides, k);
  set_strides(p.v_strides, v);
  set_mask(p, o.mask);
  p.kv_lengths = lengths_of(o.kv_lengths, p.B, "kv_lengths");
  p.q_offsets = lengths_of(o.q_offsets, p.B, "q_offset");
  p.q_offset = o.q_offset.value_or(NO_OFFSET);
  p.causal = o.causal;
  p.window_left = o.window_left, p.window_right = o.window_right;
  p.scale = float(o.scale), p.softcap = float(o.softcap);
  p.sinks = floats_at(o.sinks, "sinks");
  STD_TORCH_CHECK(p.sinks == nullptr || (o.sinks->numel() == p.H && o.sinks->is_contiguous()),
                  "sinks: expected a contiguous tensor of shape (H)");
  p.alibi_slopes = floats_at(o.alibi_slopes, "alibi_slopes");
  if (p.alibi_slopes != nullptr) {
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
  if (o.dropout_p > 0) {
    p.dropout_threshold = uint32_t(o.dropout_p * 4294967296.0);
    p.dropout_seed = *static_cast<const uint64_t*>(o.seed->const_data_ptr());
  }
  return p;
}

// (B, heads, positions, width) in memory order (B, positions, heads, width), which models turn into (B, T, C) for free.
Tensor fresh_heads(const Tensor& like, int64_t heads, int64_t positions, int64_t width) {
  return fresh({like.size(0), heads, positions, width}, {positions * heads * width, width, heads * width, 1},
               like.scalar_type());
}

std::tuple<Tensor, Tensor> attention_forward(int64_t level, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& mask, const OptionalTensor& kv_lengths,
                                             const OptionalTensor& q_offsets, const OptionalTensor& sinks,
                                             const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
                                             std::optional<int64_t> q_offset, bool causal, int64_t window_left,
                                             int64_t window_right, double scale, double softcap, double dropout_p) {
  const Tensor queries = with_contiguous_heads(q), keys = with_contiguous_heads(k), values = with_contiguous_heads(v);
  AttentionForward a{};
  a.problem = problem_of(queries, keys, values,
                         {mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed, q_offset, causal, window_left,
                          window_right, scale, softcap, dropout_p});
  const AttentionProblem& p = a.problem;
  const Tensor out = fresh_heads(q, p.H, p.T, p.Dv);
  const Tensor lse = fresh({p.B, p.H, p.T}, {p.H * p.T, p.T, 1}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  set_strides(a.out_strides, out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_scratch(kernels_of(level).attention_forward(a));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    int64_t level, const Tensor& dout, const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, const OptionalTensor& kv_lengths,
    const OptionalTensor& q_offsets, const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed, std::optional<int64_t> q_offset, bool causal, int64_t window_left, int64_t window_right,
    double scale, double softcap, double dropout_p) {
  const Tensor queries = with_contiguous_heads(q), keys = with_contiguous_heads(k), values = with_contiguous_heads(v);
  const Tensor gradient = with_contiguous_heads(dout), result = with_contiguous_heads(out);
  AttentionBackward a{};
  a.problem = problem_of(queries, keys, values,
                         {mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed, q_offset, causal, window_left,
                          window_right, scale, softcap, dropout_p});
  const AttentionProblem& p = a.problem;
  for (const Tensor* t : {&gradient, &result}) {
    check_heads(*t, "dout, out");
    STD_TORCH_CHECK(t->size(0) == p.B && t->size(1) == p.H && t->size(2) == p.T && t->size(3) == p.Dv &&
                        t->scalar_type() == q.scalar_type(),
                    "dout, out: expected shape (B, H, T, Dv) and q's dtype");
  }
  const OptionalTensor lse_gradient = dlse.has_value() ? OptionalTensor(as_contiguous(*dlse)) : OptionalTensor();
  for (const OptionalTensor& t : {OptionalTensor(lse), lse_gradient}) {
    STD_TORCH_CHECK(!t.has_value() ||
                        (t->numel() == p.B * p.H * p.T && t->is_contiguous() && t->scalar_type() == ScalarType::Float),
                    "lse, dlse: expected contiguous float32 tensors of shape (B, H, T)");
  }
  const Tensor dq = fresh_heads(q, p.H, p.T, p.D), dk = fresh_heads(k, p.G, p.S, p.D);
  const Tensor dv = fresh_heads(v, p.G, p.S, p.Dv);
  const bool has_sinks = sinks.has_value();
  const Tensor dsinks = fresh({has_sinks ? p.B : 0, p.H}, {p.H, 1}, ScalarType::Float);
  a.out = result.const_data_ptr(), a.dout = gradient.const_data_ptr();
  a.lse = static_cast<const float*>(lse.const_data_ptr()), a.dlse = floats_at(lse_gradient, "dlse");
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  a.dsinks = floats_of(dsinks, has_sinks);
  set_strides(a.out_strides, result);
  set_strides(a.dout_strides, gradient);
  set_strides(a.dq_strides, dq);
  set_strides(a.dk_strides, dk);
  set_strides(a.dv_strides, dv);
  check_scratch(kernels_of(level).attention_backward(a));
  return {dq, dk, dv, dsinks};
}

}  // namespace

#define ATTENTION_OPTIONS                                                                                            \
  "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? kv_lengths, Tensor? q_offsets, Tensor? sinks,"                \
  " Tensor? alibi_slopes, Tensor? seed, int? q_offset, bool causal, int window_left, int window_right, float scale," \
  " float softcap, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("attention_forward(int level, " ATTENTION_OPTIONS ") -> (Tensor, Tensor)");
  m.def("attention_backward(int level, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " ATTENTION_OPTIONS
        ") -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace llmcore
