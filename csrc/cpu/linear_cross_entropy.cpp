// linear_cross_entropy: blocks of logits straight out of the product's tiles (gemm.h), never all of them.
//
// Forward keeps three sums for each row and block of classes, and appends them in order. Backward goes through the
// classes in chunks: it computes a chunk's logits anew, turns them into their gradient in place, and multiplies that
// with the weight and with x. It is one product more than with kept logits, for rows * classes / 128 of memory instead
// of rows * classes. All is bound by multiply-adds: 2 * rows * width * classes operations a product.
#include "cross_entropy.h"
#include "gemm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

template <class T>
bool forward(const LinearCrossEntropyForward& a) {
  const LossRule rule = rule_of(a);
  const int64_t blocks = (a.classes + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  const Bias bias(a.bias, a.bias_dtype, a.classes);
  const Scratch peaks(blocks * a.rows), totals(blocks * a.rows), centred(blocks * a.rows), hits(a.rows), losses(a.rows);
  if (!bias.ok() || !peaks.ok() || !totals.ok() || !centred.ok() || !hits.ok() || !losses.ok()) return false;

  const Matrix<T> x{static_cast<const T*>(a.x), a.width, 1}, weight{static_cast<const T*>(a.weight), a.width, 1};
  const auto summarise = [&](int64_t r, int64_t first, int64_t count, float* logits) {
    bias.add_to(logits, first, count);
    if (a.target[r] >= first && a.target[r] < first + count) hits.data()[r] = logits[a.target[r] - first];
    RowSums sums;
    sums.peak = max_over_row(count, logits);
    const float shift = sums.shift();
    const int64_t slot = first / COLUMN_BLOCK * a.rows + r;
    peaks.data()[slot] = sums.peak;
    totals.data()[slot] = sum_over_row(count, [=](vec v) { return exp_not_positive(v - shift); }, logits);
    if (a.label_smoothing > 0.0f) {
      centred.data()[slot] = sum_over_row(count, [=](vec v) { return v - shift; }, logits);
    }
  };
  if (!gemm<ProductsOf<T, T>>(a.rows, a.classes, a.width, x, weight, summarise, Cut::whole_blocks)) return false;

  for (int64_t r = 0; r < a.rows; ++r) {
    float* statistics = a.statistics + 2 * r;
    if (a.target[r] == a.ignore_index) {
      losses.data()[r] = statistics[0] = statistics[1] = 0.0f;
      continue;
    }
    RowSums row;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t slot = b * a.rows + r, behind = a.classes - b * COLUMN_BLOCK;
      row.append({peaks.data()[slot], totals.data()[slot], a.label_smoothing > 0.0f ? centred.data()[slot] : 0.0f,
                  behind < COLUMN_BLOCK ? behind : COLUMN_BLOCK});
    }
    losses.data()[r] = loss_of_row(rule, row, hits.data()[r], statistics);
  }
  reduce_losses(rule, losses.data(), a.target, a.rows, static_cast<T*>(a.loss));
  return true;
}

// Classes that are taken at once: few enough that their logits are little beside all, and as many as make products
// that are worth packing x for; in whole panels of a product, the same number for some threads.
int64_t chunk_of(int64_t classes) {
  constexpr int64_t STEP = 4 * PANEL;
  const int64_t steps = (classes / 64 + STEP / 2) / STEP;
  return steps < 1 ? STEP : steps * STEP;
}

template <class T>
class Backward {
  // bfloat16 gradients of logits are multiplied in pairs; float16 would lose the small ones.
  using Gradient = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
  using Products = ProductsOf<Gradient, T>;

 public:
  explicit Backward(const LinearCrossEntropyBackward& a)
      : a_(a),
        dloss_(rule_of(a), a.dloss, a.target, a.rows),
        bias_(a.bias, a.bias_dtype, a.classes),
        chunk_(chunk_of(a.classes)),
        gradients_(a.rows * chunk_),
        dx_(a.dx == nullptr || std::is_same_v<T, float> ? 0 : a.rows * a.width) {}

  bool run() {
    if (!bias_.ok() || !gradients_.ok() || !dx_.ok()) return false;
    for (int64_t first = 0; first < a_.classes; first += chunk_) {
      const int64_t count = a_.classes - first < chunk_ ? a_.classes - first : chunk_;
      if (!fill_gradients(first, count) || !multiply(first, count)) return false;
    }
    if (a_.dx != nullptr && !std::is_same_v<T, float>) {
      parallel_rows(a_.rows, a_.width, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * a_.width;
        map_row(static_cast<T*>(a_.dx) + at, end * a_.width - at, [](vec v) { return v; }, dx_.data() + at);
      });
    }
    return true;
  }

 private:
  const T* weight(int64_t first) const { return static_cast<const T*>(a_.weight) + first * a_.width; }
  Gradient* gradients() const { return reinterpret_cast<Gradient*>(gradients_.data()); }

  // With p the softmax: dlogits = dloss * (p - (1 - e) * [v = target] - e / V).
  bool fill_gradients(int64_t first, int64_t count) {
    const float even = a_.label_smoothing / float(a_.classes), hot = 1.0f - a_.label_smoothing;
    const auto differentiate = [&](int64_t r, int64_t n, int64_t here, float* logits) {
      Gradient* to = gradients() + r * count + n;
      const int64_t target = a_.target[r];
      if (target == a_.ignore_index) {
        std::memset(static_cast<void*>(to), 0, size_t(here) * sizeof(Gradient));
        return;
      }
      bias_.add_to(logits, first + n, here);
      const float peak = a_.statistics[2 * r], log_total = a_.statistics[2 * r + 1], dloss = dloss_.at(r);
      const auto p = [=](vec v) { return exp_not_positive((v - peak) - log_total); };
      map_row(to, here, [=](vec v) { return (p(v) - even) * dloss; }, logits);
      const int64_t hit = target - first - n;
      if (hit >= 0 && hit < here) store_partial(to + hit, (p(load_partial(logits + hit, 1)) - even - hot) * dloss, 1);
    };
    const Matrix<T> x{static_cast<const T*>(a_.x), a_.width, 1};
    return gemm<ProductsOf<T, T>>(a_.rows, count, a_.width, x, Matrix<T>{weight(first), a_.width, 1}, differentiate);
  }

  bool multiply(int64_t first, int64_t count) {
    const Gradient* g = gradients();
    if (a_.dbias != nullptr && !sum_rows(g, a_.rows, count, a_.dbias + first)) return false;
    if (a_.dweight != nullptr) {
      T* dweight = static_cast<T*>(a_.dweight) + first * a_.width;
      const auto write = [&](int64_t v, int64_t c, int64_t here, float* sums) {
        map_row(dweight + v * a_.width + c, here, [](vec s) { return s; }, sums);
      };
      const Matrix<T> x{static_cast<const T*>(a_.x), 1, a_.width};
      if (!gemm<Products>(count, a_.width, a_.rows, Matrix<Gradient>{g, 1, count}, x, write)) return false;
    }
    if (a_.dx == nullptr) return true;
    float* dx = std::is_same_v<T, float> ? static_cast<float*>(a_.dx) : dx_.data();
    const auto add = [&](int64_t r, int64_t c, int64_t here, float* sums) {
      float* to = dx + r * a_.width + c;
      if (first == 0) return map_row(to, here, [](vec s) { return s; }, sums);
      map_row(to, here, [](vec d, vec s) { return d + s; }, to, sums);
    };
    const Matrix<T> w{weight(first), 1, a_.width};
    return gemm<Products>(a_.rows, a_.width, count, Matrix<Gradient>{g, count, 1}, w, add);
  }

  const LinearCrossEntropyBackward& a_;
  LossGradient<T> dloss_;
  Bias bias_;
  int64_t chunk_;
  Scratch gradients_, dx_;
};

}  // namespace

bool linear_cross_entropy_forward(const LinearCrossEntropyForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool linear_cross_entropy_backward(const LinearCrossEntropyBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return Backward<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
