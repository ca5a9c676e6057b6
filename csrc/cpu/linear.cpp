// linear: three products of matrices (gemm.h), the forward pass and both gradients.
#include "gemm.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// y of x (M, K), which is a.x or stands for it.
template <class Y, class X, class W>
bool forward(const LinearForward& a, const X* x) {
  const Bias bias(a.bias, a.bias_dtype, a.N);
  if (!bias.ok()) return false;
  const Matrix<X> rows{x, a.K, 1};
  const Matrix<W> weight{static_cast<const W*>(a.weight), a.K, 1};
  return gemm<ProductsOf<X, W>>(a.M, a.N, a.K, rows, weight,
                                [&](int64_t m, int64_t n, int64_t count, const float* sums) {
                                  bias.add_to(sums, n, count, static_cast<Y*>(a.y) + m * a.N + n);
                                });
}

template <class T, class W>
bool forward(const LinearForward& a) {
  const T* x = static_cast<const T*>(a.x);
  if constexpr (std::is_same_v<W, bfloat16> && !std::is_same_v<T, bfloat16>) {
    const Scratch memory((a.M * a.K + 1) / 2);
    if (!memory.ok()) return false;
    bfloat16* rounded = reinterpret_cast<bfloat16*>(memory.data());
    parallel_rows(a.M, a.K, [&](int64_t begin, int64_t end) {
      map_row(rounded + begin * a.K, (end - begin) * a.K, [](vec v) { return v; }, x + begin * a.K);
    });
    return forward<T, bfloat16, W>(a, rounded);
  } else {
    return forward<T, T, W>(a, x);
  }
}

// C (M, N) = A B^T, rounded to T.
template <class T>
bool product(int64_t M, int64_t N, int64_t K, const Matrix<T>& a, const Matrix<T>& b, void* c) {
  return gemm<ProductsOf<T, T>>(M, N, K, a, b, [&](int64_t m, int64_t n, int64_t count, const float* sums) {
    map_row(static_cast<T*>(c) + m * N + n, count, [](vec s) { return s; }, sums);
  });
}

template <class T>
bool backward(const LinearBackward& a) {
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  const T* weight = static_cast<const T*>(a.weight);
  return (a.dx == nullptr || product<T>(a.M, a.K, a.N, {dy, a.N, 1}, {weight, 1, a.K}, a.dx)) &&
         (a.dweight == nullptr || product<T>(a.N, a.K, a.M, {dy, 1, a.N}, {x, 1, a.K}, a.dweight)) &&
         (a.dbias == nullptr || sum_rows(dy, a.M, a.N, a.dbias));
}

}  // namespace

bool linear_forward(const LinearForward& a) {
  return with_dtype(a.dtype, [&](auto t) {
    return with_dtype(a.weight_dtype, [&](auto w) { return forward<decltype(t), decltype(w)>(a); });
  });
}
bool linear_backward(const LinearBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
