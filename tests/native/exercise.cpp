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
  require(kernels.softmax_forward({x, y, rows, width, dtype}), "softmax_forward");
  require(kernels.softmax_backward({dy, y, dx, rows, width, dtype}), "softmax_backward");
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

void two_threads(int64_t count, int64_t, Runtime::Body body, void* context) {
  std::thread other([=] { body(0, count / 2, context); });
  body(count / 2, count, context);
  other.join();
}

}  // namespace

int main() {
  runtime.parallel_for = two_threads;
  runtime.threads = [] { return int64_t{2}; };
  for (int64_t level = 0; level < level_count(); ++level) {
    if (*level_lacks(level) != 0) {
      std::printf("%s: not run, this machine lacks%s\n", level_name(level), level_lacks(level));
      continue;
    }
    const Kernels& kernels = *kernels_at(level);
    for (const Dtype dtype : DTYPES) {
      for (const int64_t width : {0, 1, 3, 16, 17, 63, 130, 1025}) {
        for (const int64_t rows : {0, 1, 7, 70}) exercise_rows(kernels, rows, width, dtype);
      }
      exercise_rows(kernels, 200, 600, dtype);  // enough for two threads
      for (const bool options : {false, true}) {
        for (const Shape& shape : std::initializer_list<Shape>{{1, 1, 1, 1, 1, 1, 1},
                                                               {2, 4, 2, 1, 700, 16, 24},
                                                               {1, 3, 1, 50, 60, 33, 7},
                                                               {1, 2, 2, 65, 270, 64, 64},
                                                               {0, 2, 2, 3, 3, 8, 8},
                                                               {1, 2, 2, 3, 0, 8, 8},
                                                               {1, 2, 2, 0, 5, 8, 8}}) {
          exercise_attention(kernels, shape, dtype, options);
        }
      }
    }
    std::printf("%s: ran\n", level_name(level));
  }
  return 0;
}
