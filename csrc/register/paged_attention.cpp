#include "attention.h"

namespace llmcore {
namespace {

// The pages that sequences use must exist: what they are looked up by is read without a check.
void check_pages(const AttentionProblem& p, int64_t pages) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t keys = p.kv_lengths[b] < p.S ? p.kv_lengths[b] : p.S;
    for (int64_t i = 0; i * p.page_length < keys; ++i) {
      const int64_t page = p.page_table[b * p.page_columns + i];
      STD_TORCH_CHECK(0 <= page && page < pages, "page_table: page ", page, " is out of range, there are ", pages);
    }
  }
}

std::tuple<Tensor, Tensor> paged_attention_forward(int64_t level, const Tensor& q, const Tensor& k_pages,
                                                   const Tensor& v_pages, const Tensor& page_table,
                                                   const OptionalTensor& kv_lengths, const OptionalTensor& q_offsets,
                                                   const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
                                                   std::optional<int64_t> q_offset, bool causal, int64_t window_left,
                                                   int64_t window_right, double scale, double softcap,
                                                   const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const Tensor queries = with_contiguous_heads(q), keys = with_contiguous_heads(k_pages);
  const Tensor values = with_contiguous_heads(v_pages);
  check_heads(queries, 4, "q");
  check_heads(keys, 4, "k_pages");
  check_heads(values, 4, "v_pages");
  AttentionForward a{};
  AttentionProblem& p = a.problem;
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3);
  p.G = keys.size(1), p.page_length = keys.size(2), p.Dv = values.size(3);
  STD_TORCH_CHECK(keys.size(3) == p.D && p.page_length > 0, "k_pages: expected the head width of q, and places");
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(values.size(i) == keys.size(i), "v_pages: expected the pages, heads and places of k_pages");
  }
  STD_TORCH_CHECK(page_table.dim() == 2, "page_table: expected 2 axes");
  p.page_columns = page_table.size(1);
  p.page_table = integers_of(page_table, p.B * p.page_columns, "page_table");
  p.S = p.page_columns * p.page_length;
  set_cache_tensors(p, queries, keys, values, k_scale, v_scale);
  set_strides(p.q_strides, queries);
  set_strides(p.k_strides, keys);
  set_strides(p.v_strides, values);
  STD_TORCH_CHECK(kv_lengths.has_value(), "kv_lengths: expected a tensor");
  set_options(p, {{},
                  kv_lengths,
                  q_offsets,
                  sinks,
                  alibi_slopes,
                  {},
                  q_offset,
                  causal,
                  window_left,
                  window_right,
                  scale,
                  softcap,
                  0.0});
  check_pages(p, keys.size(0));
  const Tensor out = fresh_heads(q, p.H, p.T, p.Dv);
  const Tensor lse = fresh({p.B, p.H, p.T}, {p.H * p.T, p.T, 1}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  set_strides(a.out_strides, out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_scratch(kernels_of(level).attention_forward(a));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def(
      "paged_attention_forward(int level, Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,"
      " Tensor? kv_lengths, Tensor? q_offsets, Tensor? sinks, Tensor? alibi_slopes, int? q_offset, bool causal,"
      " int window_left, int window_right, float scale, float softcap, Tensor? k_scale=None, Tensor? v_scale=None)"
      " -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { m.impl("paged_attention_forward", TORCH_BOX(&paged_attention_forward)); }

}  // namespace llmcore
