// Functions of every lane: exponentials, tanh, sigmoid, the normal distribution. Each says how exact it is and what it
// makes of NaN and infinities.
#pragma once

#include "vec.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// coefficients[0] + coefficients[1] * x + ...
template <int N>
INLINE vec polynomial(const float (&coefficients)[N], vec x) {
  vec p = broadcast(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, broadcast(coefficients[i]));
  return p;
}
// The same and x^N behind, which costs an addition instead of another fma.
template <int N>
INLINE vec monic_polynomial(const float (&coefficients)[N], vec x) {
  vec p = x + coefficients[N - 1];
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, broadcast(coefficients[i]));
  return p;
}

constexpr float EXP_SERIES[6] = {1.0f, 1.0f, 0.499992315f, 0.166671146f, 4.18901568e-2f, 8.31252016e-3f};
constexpr float EXP2_SERIES[6] = {1.0f, 0.693146977f, 0.240222418f, 5.550734e-2f, 9.6715339e-3f, 1.32646999e-3f};

// exp, relative error below 3 ulp on the normal range; exp(-inf) = 0, NaN goes through, results under 2^-126 may be 0,
// and x above 88.72 counts as 88.72. Range reduction by ln 2 in two parts (Cody and Waite), then a polynomial of degree
// 5 on [-ln2/2, ln2/2] fitted to the least maximal relative error, 1.05e-7.
INLINE vec exp(vec x) {
  const vec clamped = min(broadcast(88.7228394f), max(broadcast(-104.0f), x));  // NaN passes: it is the second operand
  const vec n = round(clamped * 1.44269504f);
  vec f = fma(n, broadcast(-0.693359375f), clamped);
  f = fma(n, broadcast(2.12194440e-4f), f);
  return scale_by_power(polynomial(EXP_SERIES, f), n, x < -87.3365447f);
}

// 2^f for |f| <= 1/2, relative error below 3 ulp.
INLINE vec exp2_polynomial(vec f) { return polynomial(EXP2_SERIES, f); }

// 2^x for x <= 127, relative error below 3 ulp; 2^-inf = 0, NaN goes through, results under 2^-126 may be 0.
INLINE vec exp2(vec x) {
  const vec clamped = max(broadcast(-150.0f), x);  // NaN passes: it is the second operand
  const vec n = round(clamped);
  return scale_by_power(exp2_polynomial(clamped - n), n, x < -126.0f);
}

// exp for x <= 0 (a difference to a maximum), cheaper by the care that larger x take: relative error below 3 ulp for
// x > -8 and growing to 1.4e-6 at -87; exp(-inf) = 0, NaN goes through, results under 2^-126 may be 0.
INLINE vec exp_not_positive(vec x) {
  if (!HAS_FMA) return exp(x);                     // a product that is rounded before the difference would lose bits
  const vec clamped = max(broadcast(-104.0f), x);  // NaN passes: it is the second operand
  const vec n = round(clamped * 1.44269504f);
  const vec f = fma(clamped, broadcast(1.44269504f), -n);
  return scale_by_power(exp2_polynomial(f), n, x < -87.3365447f);
}

constexpr float TANH_SERIES[6] = {-0.333333304f, 0.13333187f,     -0.0539440281f,
                                  0.0216843579f, -0.00813439293f, 0.0021017326f};

// tanh, relative error below 4 ulp: an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) cancels.
INLINE vec tanh(vec x) {
  const vec size = absolute(x);
  const vec far = 1.0f - 2.0f / (exp(size * 2.0f) + 1.0f);
  const vec square = x * x;
  const vec near = fma(x * square, polynomial(TANH_SERIES, square), x);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// exp(-x), inf below -88.72, where exp alone stays finite; NaN goes through.
INLINE vec exp_minus(vec x) { return x < -88.7228394f ? broadcast(INFINITY) : exp(-x); }
// What sigmoid divides by.
INLINE vec one_plus_exp_minus(vec x) { return 1.0f + exp_minus(x); }

struct Sigmoid {
  vec value, complement;  // sigmoid(x) and 1 - sigmoid(x), neither by a difference that cancels
};
INLINE Sigmoid sigmoid_of(vec x) {
  const vec e = exp_minus(x), value = 1.0f / (1.0f + e);
  return {value, x > 0.0f ? e * value : 1.0f - value};
}

// Of the normal distribution with the density phi(s) = exp(-s^2 / 2) / sqrt(2 pi): P(s) / Q(s) = Phi(-s) / phi(s) on
// [0, 14], both with the leading coefficient 1, and EXP2(f) = 2^f / sqrt(2 pi) on [-1/2, 1/2], fitted to the least
// maximal relative error for what the result is rounded to: together 1e-7, or 6e-5 where that is bfloat16.
template <class T>
struct NormalSeries {
  static constexpr float P[4] = {103.724915f, 94.7016602f, 40.8485298f, 9.39576817f};
  static constexpr float Q[5] = {82.7605057f, 141.594406f, 104.187248f, 41.8438225f, 9.39587307f};
  static constexpr float EXP2[6] = {0.398942322f,  0.276525646f,  0.0958343893f,
                                    0.0221441425f, 0.0038599826f, 0.000529654615f};
};
template <>
struct NormalSeries<bfloat16> {
  static constexpr float P[2] = {6.82989359f, 4.12846041f};
  static constexpr float Q[3] = {5.44914198f, 7.65094805f, 4.13716316f};
  static constexpr float EXP2[5] = {0.398941994f, 0.276515603f, 0.0958448648f, 0.0223079994f, 0.00381791824f};
};

// Phi(-|x|) and phi(x). The tail is a rational function beside phi, so that nothing cancels where it is small; its
// division waits for nothing that phi does. NaN goes through; what is under 2^-126 may be 0.
struct Normal {
  vec size, tail, density;  // size: |x|, or less where the tail is 0
};
template <class T>
INLINE vec normal_density(vec square) {
  if (!HAS_FMA) return exp(square * -0.5f) * 0.398942280f;  // as in exp_not_positive
  constexpr float SCALE = -0.721347520f;                    // exp(-s / 2) = 2^(s * this)
  const vec n = round(square * SCALE), f = fma(square, broadcast(SCALE), -n);
  return scale_by_power(polynomial(NormalSeries<T>::EXP2, f), n, square > 172.6f);
}
template <class T>
INLINE Normal normal_of(vec x) {
  using Series = NormalSeries<T>;
  const vec size = min(broadcast(15.0f), absolute(x));  // phi(15) is 0; NaN passes: it is the second operand
  const vec density = normal_density<T>(size * size);
  return {size, density * (monic_polynomial(Series::P, size) / monic_polynomial(Series::Q, size)), density};
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
