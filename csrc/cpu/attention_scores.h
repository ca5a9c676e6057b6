// Attention's scores of one query row against one block of keys: soft-cap, ALiBi, mask and range, in the definition's
// order. Both passes call it, so that they see the same scores.
#pragma once

#include "attention_keys.h"
#include "functions.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

struct ScoreRow {
  int64_t h, t;
  KeyRange range;  // of the whole row; outside of it scores are -inf
};

template <class M>
void add_mask(const M* mask, int64_t stride, float* scores, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    if constexpr (sizeof(M) == 1) {
      if (mask[j * stride] == 0) scores[j] = -INFINITY;
    } else {
      scores[j] += load_partial(mask + j * stride, 1)[0] * LOG2E;
    }
  }
}

INLINE void apply_mask(const Sequence& s, const ScoreRow& row, int64_t first, float* scores, int64_t count) {
  const AttentionProblem& p = s.problem;
  const int64_t at =
      s.batch * p.mask_strides[0] + row.h * p.mask_strides[1] + row.t * p.mask_strides[2] + first * p.mask_strides[3];
  if (p.mask_is_bool) return add_mask(static_cast<const uint8_t*>(p.mask) + at, p.mask_strides[3], scores, count);
  with_dtype(p.mask_dtype, [&](auto m) {
    add_mask(static_cast<const decltype(m)*>(p.mask) + at, p.mask_strides[3], scores, count);
    return true;
  });
}

// Turns q.k * query_scale / `scale` at scores[0, count) into the scores (times LOG2E) of keys first, first + 1, ...;
// scores behind the row's range, up to the next whole vector, are -inf. What they are still to be multiplied by: scale,
// where nothing is added to them, so that the caller can do it on the way, or 1. `count` is a multiple of LANES, and
// room for it is readable.
INLINE float finish_scores(const Sequence& s, const ScoreRow& row, int64_t first, float scale, float* scores,
                           int64_t count) {
  const AttentionProblem& p = s.problem;
  const KeyRange inside = intersect(row.range, {first, first + count});
  if (inside.empty()) {
    for (int64_t j = 0; j < count; ++j) scores[j] = -INFINITY;
    return 1.0f;
  }
  const bool is_plain = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.mask == nullptr && scale > 0.0f;
  if (!is_plain && scale != 1.0f) map_row(scores, count, [=](vec v) { return v * scale; }, scores);
  if (p.softcap != 0.0f) {
    const float cap = p.softcap * LOG2E;
    map_row(scores, count, [=](vec v) { return tanh(v) * cap; }, scores);
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = p.alibi_slopes[s.batch * p.alibi_strides[0] + row.h * p.alibi_strides[1]] * LOG2E;
    const int64_t distance = s.offset + row.t - first;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t d = distance - j;
      scores[j] -= slope * float(d < 0 ? -d : d);
    }
  }
  if (p.mask != nullptr) {
    apply_mask(s, row, inside.begin, scores + (inside.begin - first), inside.end - inside.begin);
  }
  for (int64_t j = 0; j < inside.begin - first; ++j) scores[j] = -INFINITY;
  for (int64_t j = inside.end - first; j < count; ++j) scores[j] = -INFINITY;
  return is_plain ? scale : 1.0f;
}

// Whether a row may see a key, by its range and a bool mask.
INLINE bool visible(const Sequence& s, const ScoreRow& row, int64_t key) {
  const AttentionProblem& p = s.problem;
  if (key < row.range.begin || key >= row.range.end) return false;
  if (p.mask == nullptr || !p.mask_is_bool) return true;
  return static_cast<const uint8_t*>(p.mask)[s.batch * p.mask_strides[0] + row.h * p.mask_strides[1] +
                                             row.t * p.mask_strides[2] + key * p.mask_strides[3]] != 0;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
