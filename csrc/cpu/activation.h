// What the activations and their gated forms share: each function with its slope, and the loops over rows.
#pragma once

#include "functions.h"
#include "parallel.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Elements from which on a second thread pays, as in parallel_rows.
constexpr int64_t GRAIN = 32768;

struct Activated {
  vec value, slope;
};

// z / (1 + exp(-z))
struct Silu {
  INLINE vec value(vec z) const { return z / one_plus_exp_minus(z); }
  INLINE Activated both(vec z) const {
    const auto [sigmoid, complement] = sigmoid_of(z);
    return {z * sigmoid, sigmoid * fma(z, complement, broadcast(1.0f))};
  }
};

// x * Phi(x), to be rounded to T; its slope is Phi(x) + x * phi(x).
template <class T>
struct Gelu {
  INLINE vec value(vec x) const { return value(x, normal_of<T>(x)); }
  INLINE Activated both(vec x) const {
    const Normal normal = normal_of<T>(x);
    const vec distribution = x < 0.0f ? normal.tail : 1.0f - normal.tail;
    return {value(x, normal), fma(x, normal.density, distribution)};
  }

 private:
  // max(x, 0) - |x| * Phi(-|x|): for either sign without a difference that cancels.
  INLINE static vec value(vec x, const Normal& normal) { return fma(-normal.size, normal.tail, max(x, vec{})); }
};

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2u)) with 2u = 2 sqrt(2 / pi) * (x + 0.044715 x^3).
struct GeluTanh {
  INLINE vec twice_u(vec x) const { return x * fma(x * x, broadcast(0.0713548163f), broadcast(1.59576912f)); }
  INLINE vec value(vec x) const { return x / one_plus_exp_minus(twice_u(x)); }
  INLINE Activated both(vec x) const {
    const auto [sigmoid, complement] = sigmoid_of(twice_u(x));
    const vec inner = fma(x * x, broadcast(0.214064449f), broadcast(1.59576912f));  // the slope of 2u
    return {x * sigmoid, sigmoid * fma(x * complement, inner, broadcast(1.0f))};
  }
};

// call(activation) with one of the two.
template <class T, class F>
INLINE bool with_gelu(bool tanh, const F& call) {
  return tanh ? call(GeluTanh{}) : call(Gelu<T>{});
}

// y = activation(gate) * up
template <class T, class Activation>
bool gated_forward(const GatedForward& a, const Activation& activation) {
  const T* gate = static_cast<const T*>(a.gate);
  const T* up = static_cast<const T*>(a.up);
  const Output<T> y(a.y, a.rows * a.width, a.y == a.gate || a.y == a.up);
  const auto row = [&](int64_t width, const T* g, const T* u, const Output<T>& out) {
    map_row(out, width, [&](vec z, vec v) __attribute__((always_inline)) { return activation.value(z) * v; }, g, u);
  };
  if (a.gate_stride == a.width && a.up_stride == a.width) {  // one long row
    parallel_stores(a.rows * a.width, GRAIN,
                    [&](int64_t begin, int64_t end) { row(end - begin, gate + begin, up + begin, y + begin); });
    return true;
  }
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(a.width, gate + r * a.gate_stride, up + r * a.up_stride, y + r * a.width);
  });
  return true;
}

// dgate = dy * up * activation'(gate), dup = dy * activation(gate)
template <class T, class Activation>
bool gated_backward(const GatedBackward& a, const Activation& activation) {
  const Output<T> dgate(a.dgate, a.rows * a.width), dup(a.dup, a.rows * a.width);
  const bool past_caches = dgate.rows_past_caches(a.width) && dup.rows_past_caches(a.width);
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = static_cast<const T*>(a.dy) + r * a.width;
      const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride;
      const T* up = static_cast<const T*>(a.up) + r * a.up_stride;
      for_vectors(a.width, [&](auto at) __attribute__((always_inline)) {
        const vec g = at(dy);
        const auto [value, slope] = activation.both(at(gate));
        at.put(dgate.data + r * a.width, g * at(up) * slope, past_caches);
        at.put(dup.data + r * a.width, g * value, past_caches);
      });
    }
  });
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
