// masked_softmax: rows over threads; each row of x is read from memory once and written once. Its scores and their
// exponentials are float32 in scratch, which stays in L1. With causal only what a row sees is computed, the rest is
// zeros.
//
// Forward moves 2 elements (and the mask) and does about 22 operations per seen element, mostly exp; backward moves 3
// and does 5: both are bound by memory in float32, forward by exp in the half types.
#include "softmax.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// How many elements row r of (..., T, S) may see at most.
INLINE int64_t seen_elements(bool causal, int64_t r, int64_t T, int64_t S) {
  if (!causal) return S;
  const int64_t end = S - T + r % T + 1;
  return end < 0 ? 0 : end;
}

// What a float mask makes of the score v; where it is -inf, v may be anything.
INLINE vec add_mask(vec v, vec mask) { return mask == -INFINITY ? mask : v + mask; }

// scores = x * scale where the mask has a byte that is not 0, else -inf.
template <class T>
void scores_seen(float* scores, const T* x, const uint8_t* mask, int64_t count, float scale) {
  using bytes = typename vector_of<uint8_t, LANES>::type;
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t n = count - i < LANES ? count - i : LANES;
    bytes seen = {};
    vec v;
    if (n == LANES) {
      std::memcpy(&seen, mask + i, LANES);
      v = load(x + i);
    } else {
      std::memcpy(&seen, mask + i, size_t(n));
      v = load_partial(x + i, n);
    }
    v = __builtin_convertvector(seen, ivec) != 0 ? v * scale : broadcast(-INFINITY);
    if (n == LANES) {
      store(scores + i, v);
    } else {
      store_partial(scores + i, v, n);
    }
  }
}

// A mask with any stride as a contiguous float mask.
template <class M>
void gather_mask(float* gathered, const M* mask, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(M) == 1) {
      gathered[i] = mask[i * stride] != 0 ? 0.0f : -INFINITY;
    } else {
      gathered[i] = load_partial(mask + i * stride, 1)[0];
    }
  }
}

// scores = x * scale + mask of row r's first `count` elements. `gathered` is room for as many.
template <class T>
void masked_scores(const MaskedSoftmaxForward& a, int64_t r, const T* x, int64_t count, float* scores,
                   float* gathered) {
  const float scale = a.scale;
  if (a.mask == nullptr) return map_row(scores, count, [=](vec v) { return v * scale; }, x);

  int64_t at = 0, rest = r;
  for (int64_t axis = a.axes - 2; axis >= 0; --axis) {
    at += rest % a.sizes[axis] * a.mask_strides[axis];
    rest /= a.sizes[axis];
  }
  const int64_t stride = a.mask_strides[a.axes - 1];
  const auto with_float_mask = [&](const auto* mask) {
    map_row(scores, count, [=](vec v, vec m) { return add_mask(v * scale, m); }, x, mask);
  };
  if (a.mask_is_bool) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
    if (stride == 1) return scores_seen(scores, x, mask, count, scale);
    gather_mask(gathered, mask, stride, count);
    return with_float_mask(static_cast<const float*>(gathered));
  }
  with_dtype(a.mask_dtype, [&](auto m) {
    const auto* mask = static_cast<const decltype(m)*>(a.mask) + at;
    if (stride == 1) {
      with_float_mask(mask);
    } else {
      gather_mask(gathered, mask, stride, count);
      with_float_mask(static_cast<const float*>(gathered));
    }
    return true;
  });
}

// y = softmax of `count` scores, zeros behind them. A sum of 0 is a row that sees nothing, or only -inf.
template <class T>
void forward_row(float* scores, const Output<T>& y, int64_t count, int64_t width, const T* next) {
  const float highest = max_over_row(count, scores);
  const float total = exponentials_of(scores, scores, count, highest == -INFINITY ? 0.0f : highest);
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  const float behind = total == total ? 0.0f : total;  // a NaN makes the row NaN
  map_row(scores, count, [=](vec e) { return e * scale; }, scores);
  map_row(scores + count, width - count, [=] { return broadcast(behind); });
  map_row_before(next, y, width, [](vec p) { return p; }, scores);
}

template <class T>
bool forward(const MaskedSoftmaxForward& a) {
  const int64_t S = a.sizes[a.axes - 1], rows_of_scores = a.axes < 2 ? 1 : a.sizes[a.axes - 2];
  const T* x = static_cast<const T*>(a.x);
  const Output<T> y(a.y, a.rows * S, a.y == a.x);
  Failure no_memory;
  parallel_rows(a.rows, S, [&](int64_t begin, int64_t end) {
    const Scratch scores(2 * S);
    if (!scores.ok()) return no_memory.set();
    for (int64_t r = begin; r < end; ++r) {
      const int64_t count = seen_elements(a.causal, r, rows_of_scores, S);
      masked_scores(a, r, x + r * S, count, scores.data(), scores.data() + S);
      const T* next = r + 1 < end ? x + (r + 1) * S : nullptr;
      forward_row(scores.data(), y + r * S, count, S, next);
    }
  });
  return !no_memory.happened();
}

template <class T>
bool backward(const MaskedSoftmaxBackward& a) {
  const T* dy = static_cast<const T*>(a.dy);
  const T* y = static_cast<const T*>(a.y);
  const Output<T> dx(a.dx, a.rows * a.S);
  parallel_rows(a.rows, a.S, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t count = seen_elements(a.causal, r, a.T, a.S), at = r * a.S;
      softmax_backward_row(dy + at, y + at, dx + at, count, a.scale, false);
      map_row(dx + at + count, a.S - count, [] { return vec{}; });
    }
  });
  return true;
}

}  // namespace

bool masked_softmax_forward(const MaskedSoftmaxForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return forward<decltype(t)>(a); });
}
bool masked_softmax_backward(const MaskedSoftmaxBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return backward<decltype(t)>(a); });
}

}  // namespace llmcore::LLMCORE_LEVEL
