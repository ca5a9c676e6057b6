// What the activations and their gated forms share: each function with its slope, and the loops over rows.
#pragma once

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

// x * Phi(x); its slope is Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi).
struct Gelu {
  INLINE vec value(vec x) const { return x * normal_distribution(x, exp(x * x * -0.5f)); }
  INLINE Activated both(vec x) const {
    const vec density = exp(x * x * -0.5f);
    const vec phi = normal_distribution(x, density);
    return {x * phi, fma(x, density * 0.398942280f, phi)};
  }
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
template <class F>
INLINE bool with_gelu(bool tanh, const F& call) {
  return tanh ? call(GeluTanh{}) : call(Gelu{});
}

// y = activation(gate) * up
template <class T, class Activation>
bool gated_forward(const GatedForward& a, const Activation& activation) {
  const T* gate = static_cast<const T*>(a.gate);
  const T* up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  const auto row = [&](int64_t width, const T* g, const T* u, T* out) {
    map_row(out, width, [&](vec z, vec v) __attribute__((always_inline)) { return activation.value(z) * v; }, g, u);
  };
  if (a.gate_stride == a.width && a.up_stride == a.width) {  // one long row
    parallel_for(a.rows * a.width, GRAIN,
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
  const auto row = [&](const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
    int64_t i = 0;
    for (; i + LANES <= a.width; i += LANES) {
      const vec g = load(dy + i);
      const auto [value, slope] = activation.both(load(gate + i));
      store(dgate + i, g * load(up + i) * slope);
      store(dup + i, g * value);
    }
    if (const int64_t n = a.width - i; n > 0) {
      const vec g = load_partial(dy + i, n);
      const auto [value, slope] = activation.both(load_partial(gate + i, n));
      store_partial(dgate + i, g * load_partial(up + i, n) * slope, n);
      store_partial(dup + i, g * value, n);
    }
  };
  parallel_rows(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * a.width;
      row(static_cast<const T*>(a.dy) + at, static_cast<const T*>(a.gate) + r * a.gate_stride,
          static_cast<const T*>(a.up) + r * a.up_stride, static_cast<T*>(a.dgate) + at, static_cast<T*>(a.dup) + at);
    }
  });
  return true;
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
