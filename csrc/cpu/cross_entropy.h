// What cross_entropy and linear_cross_entropy share: sums of exponentials that are taken block by block, the loss of a
// row from them, its reduction over rows, and each row's share in the gradient of that.
#pragma once

#include "functions.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
INLINE float value_at(const T* p) {
  return load_partial(p, 1)[0];
}

// Of a row, or of a part of it. NaN and +inf end up in `total`, -inf counts as a 0 there; while all are -inf, sums are
// relative to 0.
struct RowSums {
  float peak = -INFINITY;
  float total = 0.0f;    // of exp(x - peak)
  float centred = 0.0f;  // of x - peak, where it is wanted
  int64_t count = 0;

  float shift() const { return peak == -INFINITY ? 0.0f : peak; }

  void move_to(float higher) {
    if (!(higher > peak)) return;
    if (peak != -INFINITY) {
      total *= std::exp(peak - higher);
      centred += float(count) * (peak - higher);
    }
    peak = higher;
  }

  // What stands behind this part.
  void append(RowSums next) {
    move_to(next.peak);
    next.move_to(peak);
    total += next.total;
    centred += next.centred;
    count += next.count;
  }
};

struct LossRule {
  int64_t classes, ignore_index;
  float label_smoothing;
  Reduction reduction;
};

template <class Arguments>
LossRule rule_of(const Arguments& a) {
  return {a.classes, a.ignore_index, a.label_smoothing, a.reduction};
}

// A row's loss; statistics: its maximum and log(sum(exp(x - maximum))). The usual logsumexp, their sum, loses bits
// where logits are large.
INLINE float loss_of_row(const LossRule& rule, const RowSums& sums, float target_logit, float* statistics) {
  const float e = rule.label_smoothing, log_total = std::log(sums.total);
  statistics[0] = sums.peak;
  statistics[1] = log_total;
  const float loss = log_total - (target_logit - sums.peak);
  if (e == 0.0f) return loss;
  return (1.0f - e) * loss - e * (sums.centred / float(rule.classes) - log_total);
}

INLINE int64_t counted_rows(const LossRule& rule, const int64_t* target, int64_t rows) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += target[r] != rule.ignore_index;
  return count;
}

template <class T>
void reduce_losses(const LossRule& rule, const float* losses, const int64_t* target, int64_t rows, T* loss) {
  const auto itself = [](vec v) { return v; };
  if (rule.reduction == Reduction::none) return map_row(loss, rows, itself, losses);
  float total = sum_over_row(rows, itself, losses);
  if (rule.reduction == Reduction::mean) total /= float(counted_rows(rule, target, rows));
  store_partial(loss, broadcast(total), 1);
}

// What reaches row r's own loss.
template <class T>
class LossGradient {
 public:
  LossGradient(const LossRule& rule, const void* dloss, const int64_t* target, int64_t rows)
      : dloss_(static_cast<const T*>(dloss)), each_(rule.reduction == Reduction::none) {
    if (each_) return;
    shared_ = value_at(dloss_);
    if (rule.reduction == Reduction::mean) shared_ /= float(counted_rows(rule, target, rows));
  }
  float at(int64_t r) const { return each_ ? value_at(dloss_ + r) : shared_; }

 private:
  const T* dloss_;
  bool each_;
  float shared_ = 0.0f;
};

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
