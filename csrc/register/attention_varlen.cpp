#include <cstring>

#include "attention.h"

namespace llmcore {
namespace {

// Strides of (total, heads, width) in the order of (batch, head, position): there is no batch axis.
void set_packed_strides(int64_t (&strides)[3], const Tensor& t) {
  strides[0] = 0, strides[1] = t.stride(1), strides[2] = t.stride(0);
}

// Where packed sequences end; what does not decrease from 0 to at most `total` keeps the kernels inside the tensors.
const int64_t* ends_of(const Tensor& ends, int64_t sequences, int64_t total, const char* name) {
  const int64_t* end = integers_of(ends, sequences + 1, name);
  bool in_order = end[0] == 0 && end[sequences] <= total;
  for (int64_t b = 0; b < sequences; ++b) in_order = in_order && end[b] <= end[b + 1];
  STD_TORCH_CHECK(in_order, name, ": expected 0 and then ends that do not decrease, up to ", total);
  return end;
}

AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_ends,
                            const Tensor& k_ends, const AttentionOptions& o) {
  check_heads(q, 3, "q");
  check_heads(k, 3, "k");
  check_heads(v, 3, "v");
  AttentionProblem p{};
  STD_TORCH_CHECK(q_ends.numel() > 0, "cu_seqlens_q: expected at least the 0");
  p.B = q_ends.numel() - 1;
  p.T = q.size(0), p.H = q.size(1), p.D = q.size(2);
  p.S = k.size(0), p.G = k.size(1), p.Dv = v.size(2);
  STD_TORCH_CHECK(k.size(2) == p.D, "k: expected the head width of q");
  STD_TORCH_CHECK(v.size(0) == p.S && v.size(1) == p.G, "v: expected the positions and heads of k");
  p.q_ends = ends_of(q_ends, p.B, p.T, "cu_seqlens_q");
  p.k_ends = ends_of(k_ends, p.B, p.S, "cu_seqlens_k");
  set_tensors(p, q, k, v);
  set_packed_strides(p.q_strides, q);
  set_packed_strides(p.k_strides, k);
  set_packed_strides(p.v_strides, v);
  set_options(p, o);
  return p;
}

AttentionOptions options_of(bool causal, int64_t window_left, int64_t window_right, double scale, double softcap) {
  AttentionOptions o{};
  o.causal = causal, o.window_left = window_left, o.window_right = window_right, o.scale = scale, o.softcap = softcap;
  return o;
}

// (total, heads, width) of q's dtype, zeros from row `end` on: those are no sequence's.
Tensor fresh_packed(const Tensor& q, int64_t total, int64_t heads, int64_t width, int64_t end) {
  const Tensor t = fresh({total, heads, width}, {heads * width, width, 1}, q.scalar_type());
  const int64_t row = heads * width * int64_t(q.element_size());
  if (total > end) std::memset(static_cast<char*>(t.mutable_data_ptr()) + end * row, 0, size_t((total - end) * row));
  return t;
}

std::tuple<Tensor, Tensor> attention_varlen_forward(int64_t level, const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& q_ends, const Tensor& k_ends, bool causal,
                                                    int64_t window_left, int64_t window_right, double scale,
                                                    double softcap) {
  const Tensor queries = with_contiguous_heads(q), keys = with_contiguous_heads(k), values = with_contiguous_heads(v);
  AttentionForward a{};
  a.problem =
      problem_of(queries, keys, values, q_ends, k_ends, options_of(causal, window_left, window_right, scale, softcap));
  const AttentionProblem& p = a.problem;
  const Tensor out = fresh_packed(q, p.T, p.H, p.Dv, p.q_ends[p.B]);
  const Tensor lse = fresh({p.H, p.T}, {p.T, 1}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  set_packed_strides(a.out_strides, out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_scratch(kernels_of(level).attention_forward(a));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(int64_t level, const Tensor& dout, const Tensor& out,
                                                             const Tensor& lse, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& q_ends,
                                                             const Tensor& k_ends, bool causal, int64_t window_left,
                                                             int64_t window_right, double scale, double softcap) {
  const Tensor queries = with_contiguous_heads(q), keys = with_contiguous_heads(k), values = with_contiguous_heads(v);
  const Tensor gradient = with_contiguous_heads(dout), result = with_contiguous_heads(out);
  AttentionBackward a{};
  a.problem =
      problem_of(queries, keys, values, q_ends, k_ends, options_of(causal, window_left, window_right, scale, softcap));
  const AttentionProblem& p = a.problem;
  for (const Tensor* t : {&gradient, &result}) {
    check_heads(*t, 3, "dout, out");
    STD_TORCH_CHECK(t->size(0) == p.T && t->size(1) == p.H && t->size(2) == p.Dv && t->scalar_type() == q.scalar_type(),
                    "dout, out: expected shape (total_q, H, Dv) and q's dtype");
  }
  STD_TORCH_CHECK(lse.numel() == p.H * p.T && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "lse: expected a contiguous float32 tensor of shape (H, total_q)");
  const Tensor dq = fresh_packed(q, p.T, p.H, p.D, p.q_ends[p.B]);
  const Tensor dk = fresh_packed(q, p.S, p.G, p.D, p.k_ends[p.B]);
  const Tensor dv = fresh_packed(q, p.S, p.G, p.Dv, p.k_ends[p.B]);
  a.out = result.const_data_ptr(), a.dout = gradient.const_data_ptr();
  a.lse = static_cast<const float*>(lse.const_data_ptr());
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  set_packed_strides(a.out_strides, result);
  set_packed_strides(a.dout_strides, gradient);
  set_packed_strides(a.dq_strides, dq);
  set_packed_strides(a.dk_strides, dk);
  set_packed_strides(a.dv_strides, dv);
  check_scratch(kernels_of(level).attention_backward(a));
  return {dq, dk, dv};
}

}  // namespace

#define VARLEN_ARGUMENTS                                                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor q_ends, Tensor k_ends, bool causal, int window_left, int window_right, " \
  "float scale, float softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("attention_varlen_forward(int level, " VARLEN_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("attention_varlen_backward(int level, Tensor dout, Tensor out, Tensor lse, " VARLEN_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("attention_varlen_forward", TORCH_BOX(&attention_varlen_forward));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
}

}  // namespace llmcore
