// cross_entropy: rows over threads. Forward reads each row from memory once, block by block: a block's maximum, then
// the sum of its exponentials from L1, the sum so far being rescaled where the maximum grew (Milakov and Gimelshein,
// 2018). Backward reads the row and writes its gradient once, with the forward pass's statistics.
//
// Forward moves 1 element and does about 20 operations per element (exp is most of them), backward moves 2 and does as
// many: float32 is bound by memory, the half types by exp. Statistics are the maximum and the log of the sum relative
// to it, since their sum, the usual logsumexp, loses bits where logits are large. Rows are summed in one fixed order.
#include "cross_entropy.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

constexpr int64_t BLOCK = 2048;  // elements of a row that stay in L1 between the two reads, beside as many to come

// `more`: another row lies behind this one, and its beginning is asked for.
template <class T>
RowSums sums_of(const T* x, int64_t width, bool with_centred, bool more) {
  RowSums sums;
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t count = width - begin < BLOCK ? width - begin : BLOCK;
    sums.move_to(max_over_row(count, x + begin));
    const float shift = sums.shift();
    const T* next = more || begin + count < width ? x + begin + count : nullptr;
    sums.total += sum_over_row_at(count, [=](auto at) {
      if (next != nullptr) prefetch_vectors(next + at.i, 1);
      return exp_not_positive(at(x + begin) - shift);
    });
    if (with_centred) sums.centred += sum_over_row(count, [=](vec v) { return v - shift; }, x + begin);
    sums.count += count;
  }
  return sums;
}

template <class T>
bool forward(const CrossEntropyForward& a) {
  const Scratch losses(a.rows);
  if (!losses.ok()) return false;
  const LossRule rule = rule_of(a);
  const T* logits = static_cast<const T*>(a.logits);
  parallel_rows(a.rows, a.classes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* statistics = a.statistics + 2 * r;
      if (a.target[r] == a.ignore_index) {
        losses.data()[r] = statistics[0] = statistics[1] = 0.0f;
        continue;
      }
      const T* x = logits + r * a.classes;
      const RowSums sums = sums_of(x, a.classes, a.label_smoothing > 0.0f, r + 1 < end);
      losses.data()[r] = loss_of_row(rule, sums, value_at(x + a.target[r]), statistics);
    }
  });
  reduce_losses(rule, losses.data(), a.target, a.rows, static_cast<T*>(a.loss));
  return true;
}

// With p the softmax: dlogits = dloss * (p - (1 - e) * [v = target] - e / V).
template <class T>
void backward_row(const CrossEntropyBackward& a, float dloss, const T* x, int64_t target, const float* statistics,
                  const Output<T>& dx) {
  const float peak = statistics[0], log_total = statistics[1];
  const float even = a.label_smoothing / float(a.classes), hot = 1.0f - a.label_smoothing;
  const auto p = [=](vec v) { return exp_not_positive((v - peak) - log_total); };
  map_row(dx, a.classes, [=](vec v) { return (p(v) - even) * dloss; }, x);
  if (dx.past_caches) order_stores();
  store_partial(dx.data + target, (p(load_partial(x + target, 1)) - even - hot) * dloss, 1);
}

template <class T>
bool backward(const CrossEntropyBackward& a) {
  const T* logits = static_cast<const T*>(a.logits);
  const LossGradient<T> dloss(rule_of(a), a.dloss, a.target, a.rows);
  const Output<T> dlogits(a.dlogits, a.rows * a.classes);
  parallel_rows(a.rows, a.classes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Output<T> dx = dlogits + r * a.classes;
      if (a.target[r] == a.ignore_index) {
        std::memset(static_cast<void*>(dx.data), 0, size_t(a.classes) * sizeof(T));
      } else {
        backward_row(a, dloss.at(r), logits + r * a.classes, a.target[r], a.statistics + 2 * r, dx);
      }
    }
  });
  return true;
}

}  // namespace

bool cross_entropy_forward(const CrossEntropyForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool cross_entropy_backward(const CrossEntropyBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
