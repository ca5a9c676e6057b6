#include "attention.h"

namespace llmcore {
namespace {

// q, k, v must have contiguous last axes and outlive the problem, as the options must.
AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o,
                            const OptionalTensor& k_scale = {}, const OptionalTensor& v_scale = {}) {
  check_heads(q, 4, "q");
  check_heads(k, 4, "k");
  check_heads(v, 4, "v");
  AttentionProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3);
  p.G = k.size(1), p.S = k.size(2), p.Dv = v.size(3);
  STD_TORCH_CHECK(k.size(0) == p.B && v.size(0) == p.B, "k, v: expected the batch size of q");
  STD_TORCH_CHECK(k.size(3) == p.D, "k: expected the head width of q");
  STD_TORCH_CHECK(v.size(1) == p.G && v.size(2) == p.S, "v: expected the heads and positions of k");
  set_cache_tensors(p, q, k, v, k_scale, v_scale);
  set_strides(p.q_strides, q);
  set_strides(p.k_strides, k);
  set_strides(p.v_strides, v);
  set_options(p, o);
  return p;
}

std::tuple<Tensor, Tensor> attention_forward(int64_t level, const Tensor& q, const Tensor& k, const Tensor& v,
                                             double scale, bool causal, std::optional<int64_t> q_offset,
                                             const OptionalTensor& mask, const OptionalTensor& kv_lengths,
                                             const OptionalTensor& q_offsets, const OptionalTensor& sinks,
                                             const OptionalTensor& alibi_slopes, const OptionalTensor& seed,
                                             int64_t window_left, int64_t window_right, double softcap,
                                             double dropout_p, const OptionalTensor& k_scale,
                                             const OptionalTensor& v_scale) {
  const Tensor queries = with_heads(q), keys = with_heads(k), values = with_heads(v);
  AttentionForward a{};
  a.problem = problem_of(queries, keys, values,
                         {mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed, q_offset, causal, window_left,
                          window_right, scale, softcap, dropout_p},
                         k_scale, v_scale);
  const AttentionProblem& p = a.problem;
  const Tensor out = fresh_heads(q, p.H, p.T, p.Dv);
  const Tensor lse = fresh({p.B, p.H, p.T}, {p.H * p.T, p.T, 1}, ScalarType::Float, place_of(q));
  a.out = out.mutable_data_ptr();
  set_strides(a.out_strides, out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_scratch(kernels_of(level, q).attention_forward(a));
  return {out, lse};
}

// Zeros for the gradient of a mask, in float32 and of its sizes.
Tensor set_mask_gradient(AttentionBackward& a, const Tensor& mask) {
  STD_TORCH_CHECK(!a.problem.mask_is_bool, "mask: a bool mask has no gradient");
  const Tensor dmask = fresh(std::vector<int64_t>(mask.sizes().begin(), mask.sizes().end()), ScalarType::Float);
  a.dmask = static_cast<float*>(dmask.mutable_data_ptr());
  std::memset(a.dmask, 0, size_t(dmask.numel()) * sizeof(float));
  for (int i = 0; i < 4; ++i) a.dmask_strides[i] = mask.size(i) == 1 ? 0 : dmask.stride(i);
  return dmask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    int64_t level, const Tensor& dout, const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
    bool need_dmask, bool need_dslopes, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
    std::optional<int64_t> q_offset, const OptionalTensor& mask, const OptionalTensor& kv_lengths,
    const OptionalTensor& q_offsets, const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed, int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  const Tensor queries = with_heads(q), keys = with_heads(k), values = with_heads(v);
  const Tensor gradient = with_heads(dout), result = with_heads(out);
  AttentionBackward a{};
  a.problem = problem_of(queries, keys, values,
                         {mask, kv_lengths, q_offsets, sinks, alibi_slopes, seed, q_offset, causal, window_left,
                          window_right, scale, softcap, dropout_p});
  const AttentionProblem& p = a.problem;
  STD_TORCH_CHECK(p.kv_dtype == KvDtype::same, "k, v: expected q's dtype");
  for (const Tensor* t : {&gradient, &result}) {
    check_heads(*t, 4, "dout, out");
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
  const Tensor dsinks = fresh({has_sinks ? p.B : 0, p.H}, {p.H, 1}, ScalarType::Float, place_of(q));
  a.out = result.const_data_ptr(), a.dout = gradient.const_data_ptr();
  a.lse = static_cast<const float*>(lse.const_data_ptr()), a.dlse = floats_at(lse_gradient, "dlse");
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  a.dsinks = floats_of(dsinks, has_sinks);
  STD_TORCH_CHECK(!need_dslopes || alibi_slopes.has_value(), "alibi_slopes: a gradient of none was asked for");
  const Tensor dslopes = fresh({need_dslopes ? p.B : 0, p.H}, {p.H, 1}, ScalarType::Float, place_of(q));
  a.dslopes = floats_of(dslopes, need_dslopes);
  STD_TORCH_CHECK(!need_dmask || mask.has_value(), "mask: a gradient of none was asked for");
  const Tensor dmask = need_dmask ? set_mask_gradient(a, *mask) : float_vector(false, 0, place_of(q));
  set_strides(a.out_strides, result);
  set_strides(a.dout_strides, gradient);
  set_strides(a.dq_strides, dq);
  set_strides(a.dk_strides, dk);
  set_strides(a.dv_strides, dv);
  check_scratch(kernels_of(level, q).attention_backward(a));
  return {dq, dk, dv, dsinks, dmask, dslopes};
}

template <typename Library>
void implement(Library& m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace

// What most calls leave at its default stands behind: each argument that is given costs time.
#define ATTENTION_OPTIONS                                                                                          \
  "Tensor q, Tensor k, Tensor v, float scale, bool causal, int? q_offset=None, Tensor? mask=None,"                 \
  " Tensor? kv_lengths=None, Tensor? q_offsets=None, Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? seed=" \
  "None, int window_left=-1, int window_right=-1, float softcap=0.0, float dropout_p=0.0"

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("attention_forward(int level, " ATTENTION_OPTIONS
        ", Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(int level, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool need_dmask,"
      " bool need_dslopes, " ATTENTION_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
