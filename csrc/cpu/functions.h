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

// Of the normal distribution: P(s) / Q(s) = exp(s^2 / 2) * Phi(-s) on [0, 14] and EXP2(f) = 2^f on [-1/2, 1/2], fitted
// to the least maximal relative error for what the result is rounded to: together 1e-7, or 3e-5 where that is bfloat16.
template <class T>
struct NormalSeries {
  static constexpr float P[5] = {0.5f, 0.437250197f, 0.182461292f, 0.0403723717f, 0.00407758262f};
  static constexpr float Q[6] = {1.0f, 1.67238533f, 1.19928849f, 0.467427671f, 0.101205342f, 0.0102208555f};
  static constexpr const float (&EXP2)[6] = EXP2_SERIES;
};
template <>
struct NormalSeries<bfloat16> {
  static constexpr float P[3] = {0.50001204f, 0.278238803f, 0.0625111237f};
  static constexpr float Q[4] = {1.0f, 1.35511124f, 0.702525258f, 0.156515628f};
  static constexpr float EXP2[5] = {0.999999285f, 0.693121791f, 0.240247443f, 5.59178628e-2f, 9.57010128e-3f};
};

// Phi(x) = (1 + erf(x / sqrt(2))) / 2 and exp(-x^2 / 2), which its slope needs. The tail of Phi is a rational function,
// so that nothing cancels for negative x either. NaN goes through.
struct Normal {
  vec distribution, exp_of_minus_half_square;
};
template <class T>
INLINE vec exp_of_minus_half(vec square) {
  if (!HAS_FMA) return exp(square * -0.5f);            // as in exp_not_positive
  constexpr float SCALE = -0.721347520f;               // exp(-s / 2) = 2^(s * this)
  const vec clamped = min(broadcast(300.0f), square);  // NaN passes: it is the second operand
  const vec n = round(clamped * SCALE), f = fma(clamped, broadcast(SCALE), -n);
  return scale_by_power(polynomial(NormalSeries<T>::EXP2, f), n, square > 174.673089f);
}
template <class T>
INLINE Normal normal_of(vec x) {
  using Series = NormalSeries<T>;
  const vec size = min(broadcast(14.0f), absolute(x));  // NaN passes: it is the second operand
  const vec e = exp_of_minus_half<T>(x * x);
  const vec tail = e * polynomial(Series::P, size) / polynomial(Series::Q, size);
  return {bits_of<ivec>(x) < 0 ? tail : 1.0f - tail, e};  // by the sign's bit, which needs no comparison
}

}  // namespace
}  // namespace llmcore::LLMCORE_LEVEL
