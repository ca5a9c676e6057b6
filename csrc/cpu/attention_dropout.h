// Attention's dropout: which scores are dropped is a hash of (seed, batch, head, query, key), as
// llmcore/ops/attention.py defines it, so that the backward pass and every other backend drop the same ones.
#pragma once

#include "attention_scores.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// A 32-bit mixer (Wellons, hash-prospector: lowbias32), on integers or vectors of them.
template <class U>
INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Probabilities of keys first, first + 1, ...: 0 where dropped, else scaled by 1 / (1 - p). Whole vectors.
INLINE void drop_scores(const Sequence& s, const ScoreRow& row, int64_t first, float* probabilities, int64_t count) {
  const AttentionProblem& p = s.problem;
  if (p.dropout_threshold == 0) return;
  const uint64_t index = uint64_t((s.batch * p.H + row.h) * p.T + row.t);
  uint32_t key = mix(uint32_t(p.dropout_seed));
  key = mix(key ^ uint32_t(p.dropout_seed >> 32));
  key = mix(key ^ uint32_t(index));
  key = mix(key ^ uint32_t(index >> 32));
  const float scale = 1.0f / (1.0f - float(p.dropout_threshold) * 0x1p-32f);
  uvec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = uint32_t(i);
  for (int64_t j = 0; j < count; j += LANES) {
    const uvec hash = mix(key + (lane + uint32_t(first + j)) * 0x9e3779b9u);
    const vec kept = load(probabilities + j) * scale;
    store(probabilities + j, hash < p.dropout_threshold ? vec{} : kept);
  }
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
