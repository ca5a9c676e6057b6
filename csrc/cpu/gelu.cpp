// gelu: elements over threads, one pass.
//
// Forward moves 2 elements and does about 25 operations and a division per element, backward moves 3 and does about 30
// (exp and a rational function, shorter ones for bfloat16): bound by memory where the data come from there.
#include "activation.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Elements that a thread is given at least: fewer than of a norm or a product, for each is more work. (24k elements on
// two cores of a Zen 4 EPYC, November 2026: 16 us on one thread, 13 us on two; a norm takes 9 and 14.)
constexpr int64_t GELU_GRAIN = 12288;

template <class T, class Activation>
bool forward(const GeluForward& a, const Activation& activation) {
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.count, a.y == a.x);
  parallel_stores(a.count, GELU_GRAIN, [&](int64_t begin, int64_t end) {
    const auto value = [&](vec v) __attribute__((always_inline)) { return activation.value(v); };
    map_row(y + begin, end - begin, value, x + begin);
  });
  return true;
}

template <class T, class Activation>
bool backward(const GeluBackward& a, const Activation& activation) {
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  const Output<T> dx(a.dx, a.count);
  parallel_stores(a.count, GELU_GRAIN, [&](int64_t begin, int64_t end) {
    const auto gradient = [&](vec g, vec v) __attribute__((always_inline)) { return g * activation.both(v).slope; };
    map_row(dx + begin, end - begin, gradient, dy + begin, x + begin);
  });
  return true;
}

}  // namespace

// 3 dtypes x 2 approximations = 6 builds of each.
bool gelu_forward(const GeluForward& a) {
  return with_dtype(a.dtype, [&](auto t) {
    return with_gelu<decltype(t)>(a.tanh, [&](auto gelu) { return forward<decltype(t)>(a, gelu); });
  });
}
bool gelu_backward(const GeluBackward& a) {
  return with_dtype(a.dtype, [&](auto t) {
    return with_gelu<decltype(t)>(a.tanh, [&](auto gelu) { return backward<decltype(t)>(a, gelu); });
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
