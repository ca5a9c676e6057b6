// Runs every native kernel of every level that this machine runs, on buffers of exactly the right size, for a sanitizer
// to watch: odd widths, empty tensors, every dtype and option, two threads. Prints what ran; the sanitizer ends the
// process at the first fault. Values are tested elsewhere: here only NaN-free results are asked for.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/levels.h"
#include "../../csrc/team.h"

using namespace llmcore;

namespace {

std::mt19937 engine(0);

size_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

uint16_t half_bits(float x, Dtype dtype) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (dtype == Dtype::bfloat16) return uint16_t(u >> 16);
  if ((u & 0x7fffffffu) < 0x38800000u) return 0;  // small values become 0
  return uint16_t(((u >> 16) & 0x8000u) | (((u & 0x7fffffffu) - 0x38000000u) >> 13));
}

// `count` normal values in memory of their own, so that a byte too far is seen.
struct Buffer {
  Buffer(int64_t count, Dtype dtype) : data(new uint8_t[size_t(count) * bytes_of(dtype)]) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float x = normal(engine);
      const uint16_t h = half_bits(x, dtype);
      if (dtype == Dtype::float32) {
        std::memcpy(data.get() + 4 * i, &x, 4);
      } else {
        std::memcpy(data.get() + 2 * i, &h, 2);
      }
    }
  }
  operator void*() const { return data.get(); }
  float* floats() const { return reinterpret_cast<float*>(data.get()); }
  std::unique_ptr<uint8_t[]> data;
};

void require(bool ok, const char* what) {
  if (ok) return;
  std::printf("%s failed\n", what);
  std::exit(1);
}

void require_numbers(const Buffer& values, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; ++i) require(!std::isnan(values.floats()[i]), what);
}

constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

void exercise_add_norms(const Kernels& kernels, int64_t rows, int64_t width, Dtype dtype) {
  const int64_t count = rows * width;
  const Buffer x(count, dtype), residual(count, dtype), y(count, dtype), total(count, dtype);
  const Buffer dy(count, dtype), dtotal(count, dtype), dx(count, dtype), weight(width, dtype), bias(width, dtype);
  const Buffer dweight(width, Dtype::float32), dbias(width, Dtype::float32);
  require(kernels.add_rms_norm_forward({x, residual, weight, y, total, rows, width, 1e-6f, dtype, dtype}),
          "add_rms_norm_forward");
  require(
      kernels.add_layer_norm_forward({x, residual, weight, bias, y, residual, rows, width, 1e-5f, dtype, dtype, dtype}),
      "add_layer_norm_forward");
  for (const void* d : {static_cast<const void*>(dtotal), static_cast<const void*>(nullptr)}) {
    require(
        kernels.add_rms_norm_backward({{dy, total, weight, dx, dweight.floats(), rows, width, 1e-6f, dtype, dtype}, d}),
        "add_rms_norm_backward");
    require(
        kernels.add_layer_norm_backward(
            {{dy, total, nullptr, dx, dweight.floats(), dbias.floats(), rows, width, 1e-5f, dtype, Dtype::float32}, d}),
        "add_layer_norm_backward");
  }
  require_numbers(dweight, width, "add_layer_norm_backward: NaN");
}

void exercise_rows(const Kernels& kernels, int64_t rows, int64_t width, Dtype dtype) {
  const int64_t count = rows * width;
  const Buffer x(count, dtype), dy(count, dtype), y(count, dtype), dx(count, dtype);
  const Buffer weight(width, dtype), bias(width, Dtype::float32);
  const Buffer dweight(width, Dtype::float32), dbias(width, Dtype::float32);
  for (const void* w : {static_cast<const void*>(weight), static_cast<const void*>(nullptr)}) {
    require(kernels.rms_norm_forward({x, w, y, rows, width, 1e-6f, dtype, dtype}), "rms_norm_forward");
    require(kernels.rms_norm_backward({dy, x, w, dx, dweight.floats(), rows, width, 1e-6f, dtype, dtype}),
            "rms_norm_backward");
    require_numbers(dweight, width, "rms_norm_backward: NaN");
    require(kernels.layer_norm_forward({x, w, bias, y, rows, width, 1e-5f, dtype, dtype, Dtype::float32}),
            "layer_norm_forward");
    require(
        kernels.layer_norm_backward({dy, x, w, dx, dweight.floats(), dbias.floats(), rows, width, 1e-5f, dtype, dtype}),
        "layer_norm_backward");
    require_numbers(dbias, width, "layer_norm_backward: NaN");
  }
  require(kernels.rms_norm_backward({dy, x, nullptr, dx, nullptr, rows, width, 1e-6f, dtype, dtype}),
          "without dweight");
  exercise_add_norms(kernels, rows, width, dtype);
  require(kernels.softmax_forward({x, y, rows, width, dtype}), "softmax_forward");
  require(kernels.softmax_backward({dy, y, dx, rows, width, dtype}), "softmax_backward");
}

void exercise_gelu(const Kernels& kernels, int64_t count, Dtype dtype) {
  const Buffer x(count, dtype), dy(count, dtype), y(count, dtype), dx(count, dtype);
  for (const bool tanh : {false, true}) {
    require(kernels.gelu_forward({x, y, count, dtype, tanh}), "gelu_forward");
    require(kernels.gelu_backward({dy, x, dx, count, dtype, tanh}), "gelu_backward");
    if (dtype == Dtype::float32) require_numbers(dx, count, "gelu_backward: NaN");
  }
}

// Two halves of one buffer, and rows that follow one another.
void exercise_gated(const Kernels& kernels, int64_t rows, int64_t width, Dtype dtype) {
  const int64_t count = rows * width, stride = 2 * width;
  const Buffer both(2 * count, dtype), dy(count, dtype), y(count, dtype), dgate(count, dtype), dup(count, dtype);
  const uint8_t* up = both.data.get() + size_t(rows == 0 ? 0 : width) * bytes_of(dtype);
  for (const bool tanh : {false, true}) {
    require(kernels.geglu_forward({both, up, y, rows, width, stride, stride, dtype, tanh}), "geglu_forward");
    require(kernels.geglu_backward({dy, both, up, dgate, dup, rows, width, stride, stride, dtype, tanh}),
            "geglu_backward");
    if (dtype == Dtype::float32) require_numbers(dgate, count, "geglu_backward: NaN");
  }
  require(kernels.swiglu_forward({both, up, y, rows, width, stride, stride, dtype, false}), "swiglu_forward");
  require(kernels.swiglu_backward({dy, both, up, dgate, dup, rows, width, stride, stride, dtype, false}),
          "swiglu_backward");
  if (dtype == Dtype::float32) require_numbers(dgate, count, "swiglu_backward: NaN");
  require(kernels.swiglu_forward({dgate, dup, y, rows, width, width, width, dtype, false}), "swiglu_forward");
}

// x as (B, T, H, D), which its strides turn; a table for each sequence, and one for all.
void exercise_rope(const Kernels& kernels, int64_t heads, int64_t length, int64_t width, int64_t half, Dtype dtype) {
  const int64_t batch = 2, count = batch * heads * length * width;
  const Buffer x(count, dtype), y(count, dtype);
  for (const Dtype angle_dtype : {Dtype::float32, dtype}) {
    const Buffer cos(batch * length * half, angle_dtype), sin(batch * length * half, angle_dtype);
    for (const bool interleaved : {false, true}) {
      for (const int64_t batch_stride : {int64_t{0}, length * half}) {
        Rope rope{x,
                  cos,
                  sin,
                  y,
                  batch,
                  heads,
                  length,
                  width,
                  half,
                  {length * heads * width, width, heads * width},
                  batch_stride,
                  dtype,
                  angle_dtype,
                  interleaved,
                  batch_stride == 0};
        require(kernels.rope(rope), "rope");
        if (dtype == Dtype::float32) require_numbers(y, count, "rope: NaN");
      }
    }
  }
}

void exercise_cross_entropy(const Kernels& kernels, int64_t rows, int64_t classes, Dtype dtype) {
  if (classes == 0) return;
  const Buffer logits(rows * classes, dtype), dlogits(rows * classes, dtype), statistics(2 * rows, Dtype::float32);
  std::vector<int64_t> target(static_cast<size_t>(rows), classes - 1);
  for (size_t i = 0; i < target.size(); i += 3) target[i] = -100;
  for (const Reduction reduction : {Reduction::mean, Reduction::sum, Reduction::none}) {
    const Buffer loss(reduction == Reduction::none ? rows : 1, dtype);
    const float smoothing = reduction == Reduction::sum ? 0.0f : 0.1f;
    require(kernels.cross_entropy_forward(
                {logits, target.data(), loss, statistics.floats(), rows, classes, -100, smoothing, reduction, dtype}),
            "cross_entropy_forward");
    require(kernels.cross_entropy_backward({loss, logits, target.data(), statistics.floats(), dlogits, rows, classes,
                                            -100, smoothing, reduction, dtype}),
            "cross_entropy_backward");
  }
  require_numbers(statistics, 2 * rows, "cross_entropy_forward: NaN");
}

// x is (2, T, S); masks of both kinds, with strides (0, S, 1), and (0, 1, 0): one value for each row.
void exercise_masked_softmax(const Kernels& kernels, int64_t T, int64_t S, Dtype dtype) {
  const int64_t rows = 2 * T, sizes[3] = {2, T, S}, full[3] = {0, S, 1}, narrow[3] = {0, 1, 0};
  const Buffer x(rows * S, dtype), y(rows * S, dtype), dy(rows * S, dtype), dx(rows * S, dtype), mask(T * S, dtype);
  std::vector<uint8_t> seen(size_t(T * S), 1);
  for (size_t i = 0; i < seen.size(); i += 2) seen[i] = 0;
  MaskedSoftmaxForward a{x, y, rows, 3, sizes, nullptr, nullptr, false, false, 0.5f, dtype, dtype};
  for (const bool causal : {false, true}) {
    a.causal = causal;
    for (const int64_t* strides : {full, narrow}) {
      a.mask_strides = strides;
      a.mask_is_bool = false;
      for (const void* m : {static_cast<const void*>(nullptr), static_cast<const void*>(mask)}) {
        a.mask = m;
        require(kernels.masked_softmax_forward(a), "masked_softmax_forward");
      }
      a.mask_is_bool = true, a.mask = seen.data();
      require(kernels.masked_softmax_forward(a), "masked_softmax_forward with bytes");
    }
    require(kernels.masked_softmax_backward({dy, y, dx, rows, T, S, causal, 0.5f, dtype}), "masked_softmax_backward");
  }
  if (dtype == Dtype::float32) require_numbers(dx, rows * S, "masked_softmax_backward: NaN");
}

void exercise_linear(const Kernels& kernels, int64_t rows, int64_t width, int64_t outputs, Dtype dtype) {
  const Buffer x(rows * width, dtype), bias(outputs, Dtype::float32), y(rows * outputs, dtype);
  for (const Dtype plain : DTYPES) {
    const Buffer weight(outputs * width, plain);
    require(kernels.linear_forward({x, weight, bias, y, rows, outputs, width, dtype, plain, Dtype::float32}),
            "linear_forward");
  }
  const Buffer weight(outputs * width, dtype), dweight(outputs * width, dtype), dx(rows * width, dtype);
  const Buffer dbias(outputs, Dtype::float32);
  require(kernels.linear_backward({y, x, weight, dx, dweight, dbias.floats(), rows, outputs, width, dtype}),
          "linear_backward");
}

void exercise_linear_cross_entropy(const Kernels& kernels, int64_t rows, int64_t width, int64_t classes, Dtype dtype) {
  const Buffer x(rows * width, dtype), weight(classes * width, dtype), bias(classes, dtype), losses(rows, dtype);
  const Buffer dx(rows * width, dtype), dweight(classes * width, dtype), dbias(classes, Dtype::float32);
  const Buffer statistics(2 * rows, Dtype::float32);
  std::vector<int64_t> target(size_t(rows), classes - 1);
  if (rows > 1) target[1] = -100;
  require(kernels.linear_cross_entropy_forward({x, weight, bias, target.data(), losses, statistics.floats(), nullptr,
                                                nullptr, nullptr, rows, width, classes, -100, 0.1f, Reduction::none,
                                                dtype, dtype}),
          "linear_cross_entropy_forward");
  require(kernels.linear_cross_entropy_backward({losses, x, weight, bias, target.data(), statistics.floats(), dx,
                                                 dweight, dbias.floats(), rows, width, classes, -100, 0.1f,
                                                 Reduction::none, dtype, dtype}),
          "linear_cross_entropy_backward");
  if (dtype != Dtype::float32) return;
  const Buffer loss(1, dtype);
  require(kernels.linear_cross_entropy_forward({x, weight, bias, target.data(), loss, statistics.floats(), dx.floats(),
                                                dweight.floats(), dbias.floats(), rows, width, classes, -100, 0.1f,
                                                Reduction::mean, dtype, dtype}),
          "linear_cross_entropy_forward, with gradients");
}

void exercise_linear_quantized(const Kernels& kernels, int64_t rows, int64_t width, int64_t group, Dtype dtype) {
  constexpr int64_t outputs = 103, padded = 112;
  const Buffer x(rows * width, dtype), bias(outputs, dtype), y(rows * outputs, dtype);
  const Buffer scales(padded * width / group, Dtype::float16), minimums(padded * width / group, Dtype::float16);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[size_t(padded * width)]());
  const std::unique_ptr<uint8_t[]> halves(new uint8_t[size_t(padded * width / 2)]());
  const auto run = [&](const uint8_t* values, const void* least, const void* biases, QuantizedFormat format) {
    require(kernels.linear_quantized_forward(
                {x, values, scales, least, biases, y, rows, outputs, width, group, dtype, dtype, format}),
            "linear_quantized_forward");
    if (dtype == Dtype::float32) require_numbers(y, rows * outputs, "linear_quantized_forward: NaN");
  };
  run(bytes.get(), nullptr, bias, QuantizedFormat::int8);
  run(halves.get(), nullptr, nullptr, QuantizedFormat::int4);
  run(halves.get(), minimums, bias, QuantizedFormat::int4);
}

struct Shape {
  int64_t B, H, G, T, S, D, Dv;
};

void set_contiguous(int64_t (&strides)[3], int64_t heads, int64_t positions, int64_t width) {
  strides[0] = heads * positions * width;
  strides[1] = positions * width;
  strides[2] = width;
}

void exercise_attention(const Kernels& kernels, const Shape& s, Dtype dtype, bool options) {
  const int64_t q_count = s.B * s.H * s.T * s.D, k_count = s.B * s.G * s.S * s.D, v_count = s.B * s.G * s.S * s.Dv;
  const int64_t out_count = s.B * s.H * s.T * s.Dv, rows = s.B * s.H * s.T;
  const Buffer q(q_count, dtype), k(k_count, dtype), v(v_count, dtype), out(out_count, dtype), dout(out_count, dtype);
  const Buffer dq(q_count, dtype), dk(k_count, dtype), dv(v_count, dtype);
  const Buffer lse(rows, Dtype::float32), dlse(rows, Dtype::float32), sinks(s.H, Dtype::float32);
  const Buffer slopes(s.H, Dtype::float32), dsinks(s.B * s.H, Dtype::float32), mask(s.T * s.S, dtype);
  const Buffer dslopes(s.B * s.H, Dtype::float32), dmask(s.T * s.S, Dtype::float32);
  std::vector<int64_t> lengths(size_t(s.B), s.S), offsets(size_t(s.B), s.S - s.T);
  if (s.B > 0) lengths[0] = s.S / 2;

  AttentionForward forward{};
  AttentionProblem& p = forward.problem;
  p.q = q, p.k = k, p.v = v;
  p.B = s.B, p.H = s.H, p.G = s.G, p.T = s.T, p.S = s.S, p.D = s.D, p.Dv = s.Dv;
  set_contiguous(p.q_strides, s.H, s.T, s.D);
  set_contiguous(p.k_strides, s.G, s.S, s.D);
  set_contiguous(p.v_strides, s.G, s.S, s.Dv);
  set_contiguous(forward.out_strides, s.H, s.T, s.Dv);
  p.dtype = dtype;
  p.scale = 0.1f;
  p.q_offset = NO_OFFSET;
  p.window_left = p.window_right = -1;
  if (options) {
    p.causal = true;
    p.window_left = s.S / 3;
    p.softcap = 5.0f;
    p.kv_lengths = lengths.data(), p.q_offsets = offsets.data();
    p.sinks = sinks.floats(), p.alibi_slopes = slopes.floats();
    p.alibi_strides[1] = 1;
    p.mask = mask, p.mask_dtype = dtype;
    p.mask_strides[2] = s.S, p.mask_strides[3] = 1;
    p.dropout_threshold = 1u << 30;
  }
  forward.out = out, forward.lse = lse.floats();
  require(kernels.attention_forward(forward), "attention_forward");

  AttentionBackward backward{};
  backward.problem = p;
  backward.out = out, backward.dout = dout, backward.lse = lse.floats();
  backward.dlse = options ? dlse.floats() : nullptr;
  backward.dsinks = options ? dsinks.floats() : nullptr;
  backward.dslopes = options ? dslopes.floats() : nullptr;
  backward.dmask = options ? dmask.floats() : nullptr;
  backward.dmask_strides[2] = s.S, backward.dmask_strides[3] = 1;
  backward.dq = dq, backward.dk = dk, backward.dv = dv;
  set_contiguous(backward.out_strides, s.H, s.T, s.Dv);
  set_contiguous(backward.dout_strides, s.H, s.T, s.Dv);
  set_contiguous(backward.dq_strides, s.H, s.T, s.D);
  set_contiguous(backward.dk_strides, s.G, s.S, s.D);
  set_contiguous(backward.dv_strides, s.G, s.S, s.Dv);
  require(kernels.attention_backward(backward), "attention_backward");
  if (dtype == Dtype::float32) {
    require_numbers(out, out_count, "attention_forward: NaN");
    require_numbers(dq, q_count, "attention_backward: NaN");
    require_numbers(dk, k_count, "attention_backward: NaN");
  }
}

// Sequences one behind the other, one of them empty, and a token of none behind them.
void exercise_packed_sequences(const Kernels& kernels, Dtype dtype) {
  const int64_t H = 4, G = 2, D = 64, Dv = 32;
  const int64_t q_ends[] = {0, 3, 3, 73, 74}, k_ends[] = {0, 300, 300, 380, 385}, T = 75, S = 386;
  const Buffer q(T * H * D, dtype), k(S * G * D, dtype), v(S * G * Dv, dtype), out(T * H * Dv, dtype);
  const Buffer dq(T * H * D, dtype), dk(S * G * D, dtype), dv(S * G * Dv, dtype), lse(H * T, Dtype::float32);

  AttentionForward forward{};
  AttentionProblem& p = forward.problem;
  p.q = q, p.k = k, p.v = v;
  p.B = 4, p.H = H, p.G = G, p.T = T, p.S = S, p.D = D, p.Dv = Dv;
  p.q_ends = q_ends, p.k_ends = k_ends;
  const auto set = [](int64_t (&strides)[3], int64_t heads, int64_t width) {
    strides[0] = 0, strides[1] = width, strides[2] = heads * width;
  };
  set(p.q_strides, H, D);
  set(p.k_strides, G, D);
  set(p.v_strides, G, Dv);
  set(forward.out_strides, H, Dv);
  p.dtype = dtype, p.scale = 0.1f, p.q_offset = NO_OFFSET, p.causal = true;
  p.window_left = p.window_right = -1;
  forward.out = out, forward.lse = lse.floats();
  require(kernels.attention_forward(forward), "attention_forward");

  AttentionBackward backward{};
  backward.problem = p;
  backward.out = out, backward.dout = out, backward.lse = lse.floats();
  backward.dq = dq, backward.dk = dk, backward.dv = dv;
  set(backward.out_strides, H, Dv);
  set(backward.dout_strides, H, Dv);
  set(backward.dq_strides, H, D);
  set(backward.dk_strides, G, D);
  set(backward.dv_strides, G, Dv);
  require(kernels.attention_backward(backward), "attention_backward");
}

// Keys in pages of five; behind a sequence's length the table holds no page.
void exercise_pages(const Kernels& kernels, int64_t T, Dtype dtype) {
  const int64_t H = 4, G = 2, D = 64, page_length = 5, pages = 7;
  const int64_t table[] = {6, 0, 3, 2, 5, 1, -1, -1, -1, -1}, lengths[] = {23, 4};
  const Buffer q(2 * H * T * D, dtype), k(pages * G * page_length * D, dtype), v(pages * G * page_length * D, dtype);
  const Buffer out(2 * H * T * D, dtype), lse(2 * H * T, Dtype::float32);

  AttentionForward forward{};
  AttentionProblem& p = forward.problem;
  p.q = q, p.k = k, p.v = v;
  p.B = 2, p.H = H, p.G = G, p.T = T, p.D = p.Dv = D;
  p.page_table = table, p.page_columns = 5, p.page_length = page_length, p.S = 25;
  p.kv_lengths = lengths;
  set_contiguous(p.q_strides, H, T, D);
  set_contiguous(p.k_strides, G, page_length, D);
  set_contiguous(p.v_strides, G, page_length, D);
  set_contiguous(forward.out_strides, H, T, D);
  p.dtype = dtype, p.scale = 0.1f, p.q_offset = NO_OFFSET;
  p.window_left = p.window_right = -1;
  forward.out = out, forward.lse = lse.floats();
  require(kernels.attention_forward(forward), "attention_forward");
}

// Keys and values in a cache of fewer bits, the last of its places filled now; `paged`: the same memory as pages.
void exercise_cache(const Kernels& kernels, const Shape& s, KvDtype kv_dtype, bool paged) {
  const int64_t rows = s.B * s.G * s.S, out_count = s.B * s.H * s.T * s.Dv;
  const Buffer q(s.B * s.H * s.T * s.D, Dtype::float32), x(s.B * s.G * s.T * (s.D + s.Dv), Dtype::float32);
  const Buffer out(out_count, Dtype::float32), lse(s.B * s.H * s.T, Dtype::float32);
  const int64_t bytes = kv_dtype == KvDtype::int8 ? 1 : 2;
  const std::unique_ptr<char[]> k(new char[size_t(rows * s.D * bytes)]()), v(new char[size_t(rows * s.Dv * bytes)]());
  const std::unique_ptr<float[]> k_scale(new float[size_t(rows)]()), v_scale(new float[size_t(rows)]());
  std::vector<int64_t> lengths(size_t(s.B), s.S), table(size_t(s.B));
  for (int64_t b = 0; b < s.B; ++b) table[size_t(b)] = s.B - 1 - b;

  AttentionForward forward{};
  AttentionProblem& p = forward.problem;
  p.B = s.B, p.H = s.H, p.G = s.G, p.T = s.T, p.S = s.S, p.D = s.D, p.Dv = s.Dv;
  p.q = q, p.k = k.get(), p.v = v.get(), p.k_scale = k_scale.get(), p.v_scale = v_scale.get();
  p.kv_dtype = kv_dtype;
  set_contiguous(p.q_strides, s.H, s.T, s.D);
  set_contiguous(p.k_strides, s.G, s.S, s.D);
  set_contiguous(p.v_strides, s.G, s.S, s.Dv);
  set_contiguous(p.k_scale_strides, s.G, s.S, 1);
  set_contiguous(p.v_scale_strides, s.G, s.S, 1);
  set_contiguous(forward.out_strides, s.H, s.T, s.Dv);
  p.scale = 0.1f, p.q_offset = NO_OFFSET, p.causal = true;
  p.window_left = p.window_right = -1;
  if (paged) p.page_table = table.data(), p.page_columns = 1, p.page_length = s.S, p.kv_lengths = lengths.data();
  forward.out = out, forward.lse = lse.floats();

  const auto store = [&](char* to, float* scale, int64_t width, const int64_t (&strides)[3]) {
    StoreRows store{};
    store.x = x.floats(), store.B = s.B, store.G = s.G, store.T = s.T, store.D = width;
    set_contiguous(store.x_strides, s.G, s.T, width);
    store.y = to + (s.S - s.T) * width * bytes, store.scale = scale + s.S - s.T, store.kv_dtype = kv_dtype;
    std::memcpy(store.y_strides, strides, sizeof strides);
    std::memcpy(store.scale_strides, p.k_scale_strides, sizeof p.k_scale_strides);
    require(kernels.store_rows(store), "store_rows");
  };
  store(k.get(), k_scale.get(), s.D, p.k_strides);
  store(v.get(), v_scale.get(), s.Dv, p.v_strides);
  require(kernels.attention_forward(forward), "attention_forward");
  require_numbers(out, out_count, "attention_forward: NaN");
}

void two_threads(int64_t count, int64_t grain, Runtime::Body body, void* context) {
  if (by_team(count, grain, body, context)) return;
  std::thread other([=] { body(0, count / 2, context); });
  body(count / 2, count, context);
  other.join();
}

// f() while the other thread waits for its parts.
template <class F>
void together(const F& f) {
  as_team(two_threads, 2, f);
}

// Parts of every length, one behind the other: each element is met once.
void exercise_team() {
  together([] {
    together([] { require(team_threads() == 2, "a team in a team"); });
    for (int64_t count = 1; count < 3000; ++count) {
      std::vector<int> met(size_t(count), 0);
      two_threads(
          count, count % 7,
          [](int64_t begin, int64_t end, void* context) {
            std::vector<int>& met = *static_cast<std::vector<int>*>(context);
            if (met.size() < 9) two_threads(2, 1, [](int64_t, int64_t, void*) {}, nullptr);  // parts in a part
            for (; begin < end; ++begin) ++met[size_t(begin)];
          },
          &met);
      for (const int times : met) require(times == 1, "a team's part");
    }
  });
  require(team_threads() == 0, "a team's end");
}

}  // namespace

int main() {
  runtime.parallel_for = two_threads;
  runtime.threads = [] { return int64_t{2}; };
  exercise_team();
  for (int64_t level = 0; level < level_count(); ++level) {
    if (*level_lacks(level) != 0) {
      std::printf("%s: not run, this machine lacks%s\n", level_name(level), level_lacks(level));
      continue;
    }
    const Kernels& kernels = *kernels_at(level);
    for (const Dtype dtype : DTYPES) {
      for (const int64_t width : {0, 1, 3, 16, 17, 63, 130, 1025}) {
        for (const int64_t rows : {0, 1, 7, 70}) {
          runtime.cache_bytes = rows == 7 ? 1 << 20 : 0;  // through the caches, or past them
          exercise_rows(kernels, rows, width, dtype);
          exercise_gated(kernels, rows, width, dtype);
          exercise_gelu(kernels, rows * width, dtype);
          exercise_cross_entropy(kernels, rows, width, dtype);
          exercise_masked_softmax(kernels, rows, width, dtype);
        }
        for (const int64_t half : {int64_t{0}, width / 3, width / 2}) {
          for (const int64_t length : {0, 1, 5}) exercise_rope(kernels, 3, length, width, half, dtype);
        }
      }
      exercise_rows(kernels, 200, 600, dtype);  // enough for two threads
      for (const int64_t width : {0, 1, 16, 33, 1040}) {
        for (const int64_t rows : {0, 1, 5, 99}) exercise_linear(kernels, rows, width, 103, dtype);
      }
      exercise_linear(kernels, 530, 33, 103, dtype);  // each thread by itself
      for (const int64_t group : {16, 32, 128}) {
        for (const int64_t groups : {0, 1, 5}) {
          for (const int64_t rows : {0, 1, 7, 75}) {
            exercise_linear_quantized(kernels, rows, group * groups, group, dtype);
          }
        }
      }
      exercise_cross_entropy(kernels, 20, 9001, dtype);
      for (const int64_t rows : {0, 1, 40, 230}) exercise_linear_cross_entropy(kernels, rows, 33, 1031, dtype);
      exercise_masked_softmax(kernels, 100, 600, dtype);
      for (const bool options : {false, true}) {
        for (const Shape& shape : std::initializer_list<Shape>{{1, 1, 1, 1, 1, 1, 1},
                                                               {2, 4, 2, 1, 700, 16, 24},
                                                               {1, 3, 1, 50, 60, 33, 7},
                                                               {1, 2, 2, 65, 270, 64, 64},
                                                               {1, 6, 2, 3, 600, 64, 32},
                                                               {4, 2, 2, 60, 70, 32, 32},
                                                               {0, 2, 2, 3, 3, 8, 8},
                                                               {1, 2, 2, 3, 0, 8, 8},
                                                               {1, 2, 2, 0, 5, 8, 8}}) {
          exercise_attention(kernels, shape, dtype, options);
        }
      }
      exercise_packed_sequences(kernels, dtype);
      for (const int64_t T : {1, 40}) exercise_pages(kernels, T, dtype);
      together([&] {
        exercise_rows(kernels, 200, 600, dtype);
        exercise_linear(kernels, 5, 1040, 103, dtype);
        exercise_linear_quantized(kernels, 7, 640, 32, dtype);
        exercise_attention(kernels, {2, 4, 2, 1, 700, 16, 24}, dtype, true);
      });
    }
    exercise_linear(kernels, 530, 1040, 512, Dtype::float32);  // so many that threads share what they pack
    for (const KvDtype dtype : {KvDtype::bfloat16, KvDtype::int8}) {
      for (const Shape& shape : std::initializer_list<Shape>{{1, 1, 1, 1, 1, 1, 1},
                                                             {2, 6, 2, 1, 700, 64, 128},
                                                             {1, 3, 1, 50, 60, 33, 7},
                                                             {1, 2, 2, 65, 270, 64, 64}}) {
        for (const bool paged : {false, true}) exercise_cache(kernels, shape, dtype, paged);
      }
    }
    std::printf("%s: ran\n", level_name(level));
  }
  return 0;
}
