// linear_cross_entropy: blocks of logits straight out of the product's tiles (gemm.h), never all of them.
//
// Forward keeps three sums for each row and block of classes, and appends them in order.
//
// Gradients come in one of two ways, neither of which holds more than a small part of the logits. Backward goes through
// the classes in chunks: it computes a chunk's logits anew, turns them into their gradient in place, and multiplies
// that with the weight and with x: four products with forward's. ForwardWithGradients goes through the rows in chunks:
// all logits of some rows, their loss, their gradients, which are multiplied while they are there: three products, for
// which the weight and its gradient pass through memory once for each chunk. So its chunks must not be too small, and
// its gradient of the weight, which is a sum over them, is in float32.
// All is bound by multiply-adds: 2 * rows * width * classes operations a product.
#include "cross_entropy.h"
#include "gemm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// The sums from which the losses of some rows are made, block by block of their logits.
class BlockSums {
 public:
  BlockSums(const LossRule& rule, const int64_t* target, int64_t rows)
      : rule_(rule),
        target_(target),
        rows_(rows),
        blocks_((rule.classes + COLUMN_BLOCK - 1) / COLUMN_BLOCK),
        peaks_(blocks_ * rows),
        totals_(blocks_ * rows),
        centred_(blocks_ * rows),
        hits_(rows) {}
  bool ok() const { return peaks_.ok() && totals_.ok() && centred_.ok() && hits_.ok(); }

  // The logits of row r from class `first` on: a whole block.
  void take(int64_t r, int64_t first, int64_t count, const float* logits) const {
    if (target_[r] >= first && target_[r] < first + count) hits_.data()[r] = logits[target_[r] - first];
    RowSums sums;
    sums.peak = max_over_row(count, logits);
    const float shift = sums.shift();
    const int64_t slot = first / COLUMN_BLOCK * rows_ + r;
    peaks_.data()[slot] = sums.peak;
    totals_.data()[slot] = sum_over_row(count, [=](vec v) { return exp_not_positive(v - shift); }, logits);
    if (rule_.label_smoothing > 0.0f) {
      centred_.data()[slot] = sum_over_row(count, [=](vec v) { return v - shift; }, logits);
    }
  }

  float loss(int64_t r, float* statistics) const {
    if (target_[r] == rule_.ignore_index) return statistics[0] = statistics[1] = 0.0f;
    RowSums row;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t slot = b * rows_ + r, behind = rule_.classes - b * COLUMN_BLOCK;
      row.append({peaks_.data()[slot], totals_.data()[slot],
                  rule_.label_smoothing > 0.0f ? centred_.data()[slot] : 0.0f,
                  behind < COLUMN_BLOCK ? behind : COLUMN_BLOCK});
    }
    return loss_of_row(rule_, row, hits_.data()[r], statistics);
  }

 private:
  LossRule rule_;
  const int64_t* target_;
  int64_t rows_, blocks_;
  Scratch peaks_, totals_, centred_, hits_;
};

// With p the softmax: dlogits = dloss * (p - (1 - e) * [v = target] - e / V), for a row's logits from class `first` on.
template <class Gradient>
void differentiate(const LossRule& rule, int64_t target, const float* statistics, float dloss, int64_t first,
                   int64_t count, const float* logits, Gradient* to) {
  if (target == rule.ignore_index) {
    std::memset(static_cast<void*>(to), 0, size_t(count) * sizeof(Gradient));
    return;
  }
  const float even = rule.label_smoothing / float(rule.classes), hot = 1.0f - rule.label_smoothing;
  const float peak = statistics[0], log_total = statistics[1];
  const auto p = [=](vec v) { return exp_not_positive((v - peak) - log_total); };
  const int64_t hit = target - first;
  const bool here = hit >= 0 && hit < count;
  const vec at_hit = here ? load_partial(logits + hit, 1) : vec{};
  map_row(to, count, [=](vec v) { return (p(v) - even) * dloss; }, logits);
  if (here) store_partial(to + hit, (p(at_hit) - even - hot) * dloss, 1);
}

// What one of several products in turn gives of a row: the first one's sums themselves, the others' added to them.
void add(bool first, int64_t count, const float* sums, float* to) {
  if (first) return map_row(to, count, [](vec s) { return s; }, sums);
  map_row(to, count, [](vec d, vec s) { return d + s; }, to, sums);
}

template <class T>
bool forward(const LinearCrossEntropyForward& a) {
  const LossRule rule = rule_of(a);
  const Bias bias(a.bias, a.bias_dtype, a.classes);
  const BlockSums sums(rule, a.target, a.rows);
  const Scratch losses(a.rows);
  if (!bias.ok() || !sums.ok() || !losses.ok()) return false;

  const Matrix<T> x{static_cast<const T*>(a.x), a.width, 1}, weight{static_cast<const T*>(a.weight), a.width, 1};
  const auto summarise = [&](int64_t r, int64_t first, int64_t count, float* logits) {
    bias.add_to(logits, first, count);
    sums.take(r, first, count, logits);
  };
  if (!gemm<ProductsOf<T, T>>(a.rows, a.classes, a.width, x, weight, summarise, Cut::whole_blocks)) return false;
  for (int64_t r = 0; r < a.rows; ++r) losses.data()[r] = sums.loss(r, a.statistics + 2 * r);
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

// Rows of memory that are needed next, fetched into the second cache a part with each tile of a product. In their
// order: the same lines fetched tile by tile, some of each of its rows, came no sooner than without.
class Ahead {
 public:
  // For a product of `product_rows` rows with as many columns.
  Ahead(const float* from, int64_t rows, int64_t columns, int64_t stride, int64_t product_rows)
      : from_(from), stride_(stride), in_row_((columns + LANES - 1) / LANES), lines_(rows * in_row_) {
    const int64_t tiles = (product_rows + TILE_ROWS - 1) / TILE_ROWS * ((columns + PANEL - 1) / PANEL);
    a_tile_ = (lines_ + tiles - 1) / tiles;
  }
  void fetch_part() {
    for (const int64_t end = line_ + a_tile_; line_ < end && line_ < lines_; ++line_) {
      __builtin_prefetch(from_ + line_ / in_row_ * stride_ + line_ % in_row_ * LANES, 0, 2);
    }
  }

 private:
  const float* from_;
  int64_t stride_, in_row_, lines_, a_tile_, line_ = 0;
};

class ForwardWithGradients {
 public:
  explicit ForwardWithGradients(const LinearCrossEntropyForward& a)
      : a_(a),
        rule_(rule_of(a)),
        dloss_(a.reduction == Reduction::mean ? 1.0f / float(counted_rows(rule_, a.target, a.rows)) : 1.0f),
        bias_(a.bias, a.bias_dtype, a.classes),
        at_once_(rows_at_once(a.rows)),
        losses_(a.rows),
        gradients_(at_once_ * a.classes),
        class_sums_(a.dbias == nullptr ? 0 : a.classes) {}

  bool run() {
    if (!bias_.ok() || !losses_.ok() || !gradients_.ok() || !class_sums_.ok()) return false;
    if (a_.rows == 0) {
      if (a_.dweight != nullptr) std::memset(a_.dweight, 0, size_t(a_.classes * a_.width) * sizeof(float));
      if (a_.dbias != nullptr) std::memset(a_.dbias, 0, size_t(a_.classes) * sizeof(float));
    }
    for (int64_t first = 0; first < a_.rows; first += at_once_) {
      const int64_t rows = a_.rows - first < at_once_ ? a_.rows - first : at_once_;
      if (!fill_gradients(first, rows) || !sum_classes(first, rows) || !multiply(first, rows)) return false;
    }
    reduce_losses(rule_, losses_.data(), a_.target, a_.rows, static_cast<float*>(a_.loss));
    return true;
  }

 private:
  // With all scratch memory a twentieth of all logits; in whole tiles of a product. ROWS_FOR_GRADIENTS, which says from
  // how many rows on that is worth it (llmcore/ops/linear_cross_entropy.py), counts on this part.
  static int64_t rows_at_once(int64_t rows) {
    const int64_t part = rows / 27 / TILE_ROWS * TILE_ROWS;
    return part < TILE_ROWS ? TILE_ROWS : part;
  }
  const float* x(int64_t first) const { return static_cast<const float*>(a_.x) + first * a_.width; }
  const float* weight(int64_t first) const { return static_cast<const float*>(a_.weight) + first * a_.width; }

  bool fill_gradients(int64_t first, int64_t rows) {
    const int64_t* target = a_.target + first;
    float *statistics = a_.statistics + 2 * first, *g = gradients_.data();
    const BlockSums sums(rule_, target, rows);
    if (!sums.ok()) return false;
    const auto keep = [&](int64_t r, int64_t n, int64_t count, float* logits) {
      float* to = g + r * a_.classes + n;
      bias_.add_to(logits, n, count, to);
      sums.take(r, n, count, to);
    };
    const Matrix<float> left{x(first), a_.width, 1}, right{weight(0), a_.width, 1};
    if (!gemm<FloatProducts>(rows, a_.classes, a_.width, left, right, keep, Cut::whole_blocks)) return false;
    parallel_for(rows, 1, [&](int64_t r, int64_t end) {
      for (; r < end; ++r) {
        losses_.data()[first + r] = sums.loss(r, statistics + 2 * r);
        float* row = g + r * a_.classes;
        differentiate(rule_, target[r], statistics + 2 * r, dloss_, 0, a_.classes, row, row);
      }
    });
    return true;
  }

  bool sum_classes(int64_t first, int64_t rows) const {
    if (a_.dbias == nullptr) return true;
    if (!sum_rows(gradients_.data(), rows, a_.classes, class_sums_.data())) return false;
    add(first == 0, a_.classes, class_sums_.data(), a_.dbias);
    return true;
  }

  // Each task takes a part of the classes: its part of the weight's gradient, and what it adds to dx, which waits for
  // the other parts' and is added in their order. Where there are more threads than parts, a task takes a slice of the
  // width, too.
  bool multiply(int64_t first, int64_t rows) const {
    if (a_.width == 0) return true;
    const int64_t threads = runtime.threads(), wanted = (2 * threads + PARTS - 1) / PARTS;
    const int64_t panels = (a_.width + PANEL - 1) / PANEL, slices = wanted < panels ? wanted : panels;
    const int64_t step = (panels + slices - 1) / slices * PANEL;
    const int64_t part = ((a_.classes + PARTS - 1) / PARTS + BLOCK - 1) / BLOCK * BLOCK;
    // Taken for these products alone, so that it can be the memory that the logits' product has just given back.
    const Scratch parts(a_.dx == nullptr ? 0 : PARTS * rows * padded_width());
    if (!parts.ok()) return false;
    const auto dx_part = [&](int64_t p) { return parts.data() + p * rows * padded_width(); };
    Failure no_memory;
    parallel_tasks(PARTS * slices, [&](const auto& next) {
      const PartOfClasses task_of(*this, first, rows, step);
      if (!task_of.ok()) return no_memory.set();
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t p = task / slices, c = task % slices * step, begin = p * part;
        const int64_t end = a_.classes < begin + part ? a_.classes : begin + part;
        if (c < a_.width) task_of.multiply(dx_part(p), begin, end, c, a_.width - c < step ? a_.width - c : step);
      }
    });
    if (no_memory.happened()) return false;
    if (a_.dx == nullptr) return true;
    parallel_rows(rows, PARTS * a_.width, [&](int64_t r, int64_t end) {
      for (; r < end; ++r) {
        for (int64_t p = 0; p < PARTS && p * part < a_.classes; ++p) {
          add(p == 0, a_.width, dx_part(p) + r * padded_width(), a_.dx + (first + r) * a_.width);
        }
      }
    });
    return true;
  }

  static constexpr int64_t PARTS = 4;    // of the classes; their number is a part of dx's bits
  static constexpr int64_t BLOCK = 128;  // classes

  int64_t padded_width() const { return (a_.width + LANES - 1) / LANES * LANES; }

  // What a thread needs to multiply with the gradients of some rows.
  class PartOfClasses {
   public:
    PartOfClasses(const ForwardWithGradients& all, int64_t first, int64_t rows, int64_t step)
        : all_(all),
          a_(all.a_),
          first_(first),
          rows_(rows),
          by_row_(group_words<FloatProducts>(rows, ONE_CHAIN)),
          by_class_(group_words<FloatProducts>(BLOCK, ONE_CHAIN)),
          x_(groups(step) * by_row_),
          weight_(groups(step) * by_class_),
          across_(groups(BLOCK) * by_row_),
          along_(groups(rows) * by_class_),
          sums_(BLOCK * LANES) {}
    bool ok() const { return x_.ok() && weight_.ok() && across_.ok() && along_.ok() && sums_.ok(); }

    // dx_part: what these classes add to dx.
    void multiply(float* dx_part, int64_t begin, int64_t end, int64_t c, int64_t columns) const {
      const Matrix<float> x{all_.x(first_) + c, 1, a_.width};
      if (a_.dweight != nullptr) pack_groups<FloatProducts>(x, columns, rows_, ONE_CHAIN, by_row_, x_.data());
      for (int64_t v = begin; v < end; v += BLOCK) {
        const int64_t count = end - v < BLOCK ? end - v : BLOCK;
        if (a_.dweight != nullptr) add_to_dweight(v, count, c, columns);
        if (a_.dx != nullptr) add_to_dx(dx_part + c, v, count, v == begin, c, columns);
      }
    }

   private:
    static int64_t groups(int64_t rows) { return (rows + LANES - 1) / LANES; }

    // A tile adds to the gradient itself, but for the columns that don't fill a vector.
    void add_to_dweight(int64_t v, int64_t count, int64_t c, int64_t columns) const {
      const Matrix<float> g{all_.gradients_.data() + v, 1, a_.classes};
      pack_groups<FloatProducts>(g, count, rows_, ONE_CHAIN, by_row_, across_.data());
      const int64_t whole = columns / LANES * LANES;
      const bool onto = first_ > 0;
      for (int64_t b = 0; b < count; b += ROW_BLOCK) {
        const int64_t here = count - b < ROW_BLOCK ? count - b : ROW_BLOCK;
        float* to = a_.dweight + (v + b) * a_.width + c;
        const float* left = across_.data() + b / LANES * by_row_;
        const int64_t behind = a_.classes - v - b - here;
        Ahead next(to + here * a_.width, !onto ? 0 : behind < ROW_BLOCK ? behind : ROW_BLOCK, columns, a_.width, here);
        const auto fetch = [&](int64_t, int64_t, int64_t, int64_t) { next.fetch_part(); };
        multiply_strip<FloatProducts>(left, x_.data(), here, whole, rows_, ONE_CHAIN, by_row_, sums_.data(), to,
                                      a_.width, fetch, onto);
        if (whole == columns) continue;
        const auto write = [&](int64_t r, int64_t end, int64_t, int64_t width) {
          for (; r < end; ++r) add(!onto, width, sums_.data() + r * LANES, to + r * a_.width + whole);
        };
        multiply_strip<FloatProducts>(left, x_.data() + whole / LANES * by_row_, here, columns - whole, rows_,
                                      ONE_CHAIN, by_row_, sums_.data(), sums_.data(), LANES, write);
      }
    }

    void add_to_dx(float* dx, int64_t v, int64_t count, bool anew, int64_t c, int64_t columns) const {
      const int64_t group = group_words<FloatProducts>(count, ONE_CHAIN);
      const Matrix<float> g{all_.gradients_.data() + v, a_.classes, 1};
      const Matrix<float> weight{all_.weight(v) + c, 1, a_.width};
      pack_groups<FloatProducts>(g, rows_, count, ONE_CHAIN, group, along_.data());
      pack_groups<FloatProducts>(weight, columns, count, ONE_CHAIN, group, weight_.data());
      const int64_t behind = a_.classes - v - count;
      Ahead next(all_.weight(v + count) + c, behind < BLOCK ? behind : BLOCK, columns, a_.width, rows_);
      const auto fetch = [&](int64_t, int64_t, int64_t, int64_t) { next.fetch_part(); };
      multiply_strip<FloatProducts>(along_.data(), weight_.data(), rows_, columns, count, ONE_CHAIN, group,
                                    sums_.data(), dx, all_.padded_width(), fetch, !anew);
    }

    const ForwardWithGradients& all_;
    const LinearCrossEntropyForward& a_;
    int64_t first_, rows_, by_row_, by_class_;
    Scratch x_, weight_, across_, along_, sums_;
  };

  const LinearCrossEntropyForward& a_;
  LossRule rule_;
  float dloss_;  // what reaches a row of a gradient of 1
  Bias bias_;
  int64_t at_once_;
  Scratch losses_, gradients_, class_sums_;
};

template <class T>
class Backward {
  // bfloat16 gradients of logits are multiplied in pairs; float16 would lose the small ones.
  using Gradient = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
  using Products = ProductsOf<Gradient, T>;

 public:
  explicit Backward(const LinearCrossEntropyBackward& a)
      : a_(a),
        rule_(rule_of(a)),
        dloss_(rule_, a.dloss, a.target, a.rows),
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

  bool fill_gradients(int64_t first, int64_t count) {
    const auto fill = [&](int64_t r, int64_t n, int64_t here, float* logits) {
      bias_.add_to(logits, first + n, here);
      differentiate(rule_, a_.target[r], a_.statistics + 2 * r, dloss_.at(r), first + n, here, logits,
                    gradients() + r * count + n);
    };
    const Matrix<T> x{static_cast<const T*>(a_.x), a_.width, 1};
    return gemm<ProductsOf<T, T>>(a_.rows, count, a_.width, x, Matrix<T>{weight(first), a_.width, 1}, fill);
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
    const auto write = [&](int64_t r, int64_t c, int64_t here, float* sums) {
      add(first == 0, here, sums, dx + r * a_.width + c);
    };
    const Matrix<T> w{weight(first), 1, a_.width};
    return gemm<Products>(a_.rows, a_.width, count, Matrix<Gradient>{g, count, 1}, w, write);
  }

  const LinearCrossEntropyBackward& a_;
  LossRule rule_;
  LossGradient<T> dloss_;
  Bias bias_;
  int64_t chunk_;
  Scratch gradients_, dx_;
};

}  // namespace

bool linear_cross_entropy_forward(const LinearCrossEntropyForward& a) {
  if (a.dx != nullptr || a.dweight != nullptr || a.dbias != nullptr) return ForwardWithGradients(a).run();
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool linear_cross_entropy_backward(const LinearCrossEntropyBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return Backward<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
