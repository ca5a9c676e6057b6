// A decoder's forward pass as one call: the kernels of this level, one after the other, as models/block.py calls them,
// and so with the same bits. It saves what a call from Python costs, some ten of them in each layer, and the work that
// nobody asks for: behind the last layer's keys and values only the tokens go on whose logits are wanted.
//
// One new token is bound by reading the weights, hundreds by the products.
#include "kernels.h"
#include "rms_norm.h"
#include "row.h"

namespace llmcore::LLMCORE_LEVEL {
namespace {

// Row n of a quantized weight in float32; LinearQuantizedForward says how it lies.
void dequantize_row(const LinearWeight& w, int64_t n, float* row) {
  constexpr int64_t PANEL = 16, QUAD = 4;
  const int64_t panel = n / PANEL, lane = n % PANEL, groups = w.K / w.group;
  const bool in_halves = w.format == QuantizedFormat::int4;
  const int64_t block_values = in_halves ? 2 * QUAD : QUAD;
  const uint8_t* values = static_cast<const uint8_t*>(w.values) + (panel * (w.K / block_values) * PANEL + lane) * QUAD;
  const auto at = [&](const void* of_groups, int64_t k) {
    return load_partial(static_cast<const float16*>(of_groups) + (panel * groups + k / w.group) * PANEL + lane, 1)[0];
  };
  const int zero = !in_halves ? 128 : w.minimums == nullptr ? 8 : 0;
  for (int64_t k = 0; k < w.K; ++k) {
    const int byte = values[k / block_values * PANEL * QUAD + k % QUAD];
    const int q = !in_halves ? byte : k % block_values < QUAD ? byte & 15 : byte >> 4;
    row[k] = float(q - zero) * at(w.scales, k);
    if (w.minimums != nullptr) row[k] += at(w.minimums, k);
  }
}

constexpr auto SAME = [](vec v) { return v; };

// T: the activations' type.
template <class T>
class Pass {
 public:
  explicit Pass(const DecoderForward& a)
      : a_(a),
        w_(*a.weights),
        tokens_(a.B * a.T),
        qkv_width_((w_.heads + 2 * w_.kv_heads) * w_.head_width),
        attended_width_(w_.heads * w_.head_width),
        up_width_(w_.layer_count > 0 ? w_.layers[0].up.N : 0),
        stream_(of(tokens_ * w_.width)),
        branch_(of(tokens_ * w_.width)),
        x_(of(tokens_ * w_.width)),
        qkv_(of(tokens_ * qkv_width_)),
        qk_(of(is_rotary() ? tokens_ * qkv_width_ : 0)),
        attended_(of(tokens_ * attended_width_)),
        hidden_(of(tokens_ * up_width_)),
        activated_(of(tokens_ * up_width_)),
        lse_(tokens_ * w_.heads),
        queries_(of(a.last == nullptr ? 0 : a.B * attended_width_)),
        angles_(is_rotary() && positions_differ() ? 2 * tokens_ * w_.rotary_width : 0),
        factors_(w_.plus_one ? w_.width : 0),
        offsets_(2 * a.B),
        lengths_(2 * a.B) {}

  bool run() {
    for (const Scratch* s : {&stream_, &branch_, &x_, &qkv_, &qk_, &attended_, &hidden_, &activated_, &lse_, &queries_,
                             &angles_, &factors_, &offsets_, &lengths_}) {
      if (!s->ok()) return false;
    }
    if (!embed()) return false;
    if (is_rotary() && positions_differ()) gather_angles();
    const void* branch = nullptr;
    for (int64_t layer = 0; layer < w_.layer_count; ++layer, branch = branch_.data()) {
      if (!attend(layer, branch) || !feed_forward(w_.layers[layer])) return false;
    }
    return norm(w_.norm, branch) && linear(w_.head, x_.data(), a_.logits);
  }

 private:
  static int64_t of(int64_t elements) { return (elements * int64_t(sizeof(T)) + 3) / 4; }
  static T* values(const Scratch& s) { return reinterpret_cast<T*>(s.data()); }
  bool is_rotary() const { return w_.position_embedding == nullptr; }

  int64_t start_of(int64_t b) const { return a_.starts == nullptr ? a_.start : a_.starts[b]; }
  int64_t position_of(int64_t b) const { return a_.positions == nullptr ? start_of(b) : a_.positions[b]; }
  bool positions_differ() const { return a_.starts != nullptr || a_.positions != nullptr; }
  int64_t keys_of(int64_t b) const { return a_.kv_lengths == nullptr ? a_.end : a_.kv_lengths[b]; }

  bool embed() {
    const LinearWeight& e = w_.embedding;
    Failure no_memory;
    parallel_rows(tokens_, w_.width, [&](int64_t begin, int64_t end) {
      const Scratch row(e.group == 0 ? 0 : w_.width);
      if (!row.ok()) return no_memory.set();
      for (int64_t i = begin; i < end; ++i) {
        T* out = values(stream_) + i * w_.width;
        if (e.group == 0) {
          with_dtype(e.dtype, [&](auto t) {
            map_row(out, w_.width, SAME, static_cast<const decltype(t)*>(e.values) + a_.ids[i] * w_.width);
            return true;
          });
        } else {
          dequantize_row(e, a_.ids[i], row.data());
          map_row(out, w_.width, SAME, row.data());
        }
        const float scale = w_.embedding_scale;
        if (scale != 1.0f) map_row(out, w_.width, [=](vec v) { return v * scale; }, out);
        if (is_rotary()) continue;
        const int64_t position = position_of(i / a_.T) + i % a_.T;
        const T* of_position = static_cast<const T*>(w_.position_embedding) + position * w_.width;
        map_row(out, w_.width, [](vec token, vec place) { return token + place; }, out, of_position);
      }
    });
    return !no_memory.happened();
  }

  // cos and sin, and those of windows behind them, (B, T, R / 2) each.
  void gather_angles() {
    const int64_t half = w_.rotary_width / 2;
    float* to = angles_.data();
    for (const float* table : {a_.cos, a_.sin, a_.window_cos, a_.window_sin}) {
      if (table == nullptr) continue;
      for (int64_t b = 0; b < a_.B; ++b, to += a_.T * half) {
        std::memcpy(to, table + position_of(b) * half, size_t(a_.T * half) * sizeof(float));
      }
    }
  }

  bool linear(const LinearWeight& w, const void* x, void* y) const {
    if (w.group == 0) {
      LinearForward p{};
      p.x = x, p.weight = w.values, p.bias = w.bias, p.y = y;
      p.M = tokens_, p.N = w.N, p.K = w.K;
      p.dtype = w_.dtype, p.weight_dtype = w.dtype, p.bias_dtype = w.bias_dtype;
      return linear_forward(p);
    }
    LinearQuantizedForward p{};
    p.x = x, p.values = static_cast<const uint8_t*>(w.values), p.scales = w.scales, p.minimums = w.minimums;
    p.bias = w.bias, p.y = y;
    p.M = tokens_, p.N = w.N, p.K = w.K, p.group = w.group;
    p.dtype = w_.dtype, p.bias_dtype = w.bias_dtype, p.format = w.format;
    return linear_quantized_forward(p);
  }

  // What an RMS norm multiplies by: its weight, or 1 + weight in float32.
  struct Factors {
    const void* data;
    Dtype dtype;
  };
  Factors factors_of(const NormWeight& n) const {
    if (!w_.plus_one) return {n.weight, w_.dtype};
    map_row(factors_.data(), w_.width, [](vec v) { return v + 1.0f; }, static_cast<const T*>(n.weight));
    return {factors_.data(), Dtype::float32};
  }

  // x = norm(stream + branch), and the sum into the stream; the norm of the stream alone without branch.
  bool norm(const NormWeight& n, const void* branch) const {
    if (branch == nullptr) return norm_alone(n, stream_.data(), x_.data());
    if (n.bias == nullptr) {
      const Factors f = factors_of(n);
      return add_rms_norm_forward(
          {branch, stream_.data(), f.data, x_.data(), stream_.data(), tokens_, w_.width, w_.eps, w_.dtype, f.dtype});
    }
    return add_layer_norm_forward({branch, stream_.data(), n.weight, n.bias, x_.data(), stream_.data(), tokens_,
                                   w_.width, w_.eps, w_.dtype, w_.dtype, w_.dtype});
  }

  // y = norm(x); nothing where there is no norm and both are one.
  bool norm_alone(const NormWeight& n, const void* x, void* y) const {
    if (n.weight == nullptr) return true;
    if (n.bias == nullptr) {
      const Factors f = factors_of(n);
      return rms_norm_forward({x, f.data, y, tokens_, w_.width, w_.eps, w_.dtype, f.dtype});
    }
    return layer_norm_forward({x, n.weight, n.bias, y, tokens_, w_.width, w_.eps, w_.dtype, w_.dtype, w_.dtype});
  }

  // Some neighbouring heads of each token's projections, from `first` on, each normed over its D in place.
  bool norm_heads(const NormWeight& n, int64_t first, int64_t heads) const {
    if (n.weight == nullptr) return true;
    const int64_t D = w_.head_width;
    const Scratch factors(D);
    if (!factors.ok()) return false;
    const float one = w_.plus_one ? 1.0f : 0.0f;
    map_row(factors.data(), D, [=](vec v) { return v + one; }, static_cast<const T*>(n.weight));
    parallel_rows(tokens_, heads * D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = values(qkv_) + i * qkv_width_ + first * D;
        for_rows<GROUP>(0, heads, [&](int64_t h, auto count) {
          T* at = row + h * D;
          rms_norm_rows<count>(at, factors.data(), Output<T>(at, 0, true), D, w_.eps, static_cast<const T*>(nullptr));
        });
      }
    });
    return true;
  }

  static const T* row_of(const T* data, const int64_t (&strides)[3], int64_t b, int64_t h, int64_t t) {
    return data + b * strides[0] + h * strides[1] + t * strides[2];
  }
  // Vectors of (batch, head, position).
  struct Heads {
    const T* data;
    int64_t strides[3];
    const T* row(int64_t b, int64_t t) const { return row_of(data, strides, b, 0, t); }
  };

  // A token's projections are all queries, all keys, all values, or the three of each head side by side.
  int64_t first_key() const { return w_.interleaved_heads ? 1 : w_.heads; }
  int64_t first_value() const { return w_.interleaved_heads ? 2 : w_.heads + w_.kv_heads; }
  // Side by side, values are turned too: nobody reads them there, and it stays one call.
  int64_t turned_heads() const { return w_.heads + (w_.interleaved_heads ? 2 : 1) * w_.kv_heads; }
  // Queries, keys or values of all projections, by the first one of them.
  Heads part_of(const Heads& all, int64_t first) const {
    const int64_t step = w_.interleaved_heads ? 3 : 1;
    return {all.data + first * all.strides[1], {all.strides[0], step * all.strides[1], all.strides[2]}};
  }

  // norm, attention and its output: from (stream, branch) to (stream, branch).
  bool attend(int64_t layer, const void* branch) {
    const DecoderLayer& l = w_.layers[layer];
    if (!norm(l.attention_norm, branch) || !linear(l.qkv, x_.data(), qkv_.data())) return false;
    if (!norm_heads(l.q_norm, 0, w_.heads) || !norm_heads(l.k_norm, w_.heads, w_.kv_heads)) return false;
    const int64_t D = w_.head_width;
    const Heads projected{values(qkv_), {a_.T * qkv_width_, D, qkv_width_}};
    Heads turned = projected;
    if (is_rotary()) {
      if (!turn(l, projected)) return false;
      turned = {values(qk_), {turned_heads() * a_.T * D, a_.T * D, D}};
    }
    const Heads queries = part_of(turned, 0);
    if (!store(layer, part_of(turned, first_key()), part_of(projected, first_value()))) return false;

    AttentionForward f{};
    AttentionProblem& p = f.problem;
    p.q = queries.data, p.k = a_.cache.keys[layer], p.v = a_.cache.values[layer];
    p.B = a_.B, p.H = w_.heads, p.G = w_.kv_heads, p.T = a_.T, p.D = D, p.Dv = D;
    for (int i = 0; i < 3; ++i)
      p.q_strides[i] = queries.strides[i], p.k_strides[i] = p.v_strides[i] = a_.cache.strides[i];
    p.kv_dtype = a_.cache.kv_dtype;
    if (p.kv_dtype == KvDtype::int8) {
      p.k_scale = a_.cache.key_scales[layer], p.v_scale = a_.cache.value_scales[layer];
      for (int i = 0; i < 3; ++i) p.k_scale_strides[i] = p.v_scale_strides[i] = a_.cache.scale_strides[i];
    }
    p.page_table = a_.cache.page_table, p.page_columns = a_.cache.page_columns, p.page_length = a_.cache.page_length;
    p.S = p.page_table == nullptr ? a_.end : p.page_columns * p.page_length;
    p.dtype = w_.dtype;
    p.kv_lengths = a_.kv_lengths;
    p.q_offsets = a_.starts, p.q_offset = a_.start;
    if (p.page_table != nullptr && a_.kv_lengths == nullptr) p.kv_lengths = same_lengths();
    p.causal = true, p.window_left = l.window > 0 ? l.window - 1 : -1, p.window_right = -1;
    p.scale = w_.scale, p.softcap = w_.softcap;
    if (layer == w_.layer_count - 1 && a_.last != nullptr) go_on_with_last(p);
    f.out = attended_.data();
    f.out_strides[0] = p.T * attended_width_, f.out_strides[1] = D, f.out_strides[2] = attended_width_;
    f.lse = lse_.data();
    return attention_forward(f) && linear(l.output, attended_.data(), branch_.data()) &&
           norm_alone(l.attention_after_norm, branch_.data(), branch_.data());
  }

  bool turn(const DecoderLayer& l, const Heads& projected) const {
    const int64_t half = w_.rotary_width / 2;
    Rope r{};
    r.x = projected.data, r.y = qk_.data();
    if (positions_differ()) {
      const float* angles = angles_.data() + (l.has_window_angles ? 2 * tokens_ * half : 0);
      r.cos = angles, r.sin = angles + tokens_ * half;
    } else {
      r.cos = (l.has_window_angles ? a_.window_cos : a_.cos) + a_.start * half;
      r.sin = (l.has_window_angles ? a_.window_sin : a_.sin) + a_.start * half;
    }
    r.B = a_.B, r.H = turned_heads(), r.T = a_.T, r.D = w_.head_width, r.half = half;
    for (int i = 0; i < 3; ++i) r.x_strides[i] = projected.strides[i];
    r.angle_batch_stride = !positions_differ() ? 0 : a_.T * half;
    r.dtype = w_.dtype, r.angle_dtype = Dtype::float32;
    return rope(r);
  }

  // The new tokens' keys and values into the cache; what pads a sequence has no place there.
  bool store(int64_t layer, const Heads& keys, const Heads& values) const {
    const DecoderCache& c = a_.cache;
    const bool has_scales = c.kv_dtype == KvDtype::int8;
    for (int64_t b = 0; b < a_.B; ++b) {
      const int64_t begin = start_of(b), length = keys_of(b) - begin, end = begin + (length < a_.T ? length : a_.T);
      for (int64_t slot = begin, run; slot < end; slot += run) {
        run = c.page_table == nullptr ? end - slot : c.page_length - slot % c.page_length;
        if (run > end - slot) run = end - slot;
        float* key_scales = has_scales ? c.key_scales[layer] : nullptr;
        float* value_scales = has_scales ? c.value_scales[layer] : nullptr;
        const int64_t t = slot - begin;
        if (!store_run(keys.row(b, t), keys.strides, c.keys[layer], key_scales, b, slot, run)) return false;
        if (!store_run(values.row(b, t), values.strides, c.values[layer], value_scales, b, slot, run)) return false;
      }
    }
    return true;
  }

  // `count` neighbours of sequence b, from the slot on, into a layer's buffer.
  bool store_run(const T* rows, const int64_t (&strides)[3], void* buffer, float* scales, int64_t b, int64_t slot,
                 int64_t count) const {
    const DecoderCache& c = a_.cache;
    const int64_t G = w_.kv_heads, D = w_.head_width;
    if constexpr (std::is_same_v<T, float>) {
      if (c.kv_dtype != KvDtype::same) {
        StoreRows s{};
        s.x = rows, s.B = 1, s.G = G, s.T = count, s.D = D, s.kv_dtype = c.kv_dtype;
        const int64_t bytes = c.kv_dtype == KvDtype::int8 ? 1 : 2;
        s.y = static_cast<char*>(buffer) + place(c.strides, b, slot) * bytes;
        if (scales != nullptr) s.scale = scales + place(c.scale_strides, b, slot);
        for (int i = 0; i < 3; ++i) {
          s.x_strides[i] = strides[i], s.y_strides[i] = c.strides[i], s.scale_strides[i] = c.scale_strides[i];
        }
        return store_rows(s);
      }
    }
    T* to = static_cast<T*>(buffer) + place(c.strides, b, slot);
    parallel_for(count, 16384 / (G * D) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(to + g * c.strides[1] + i * c.strides[2], rows + g * strides[1] + i * strides[2],
                      size_t(D) * sizeof(T));
        }
      }
    });
    return true;
  }

  // Where the first head's row of a slot lies in a layer's buffer.
  int64_t place(const int64_t (&strides)[3], int64_t b, int64_t slot) const {
    const DecoderCache& c = a_.cache;
    if (c.page_table == nullptr) return b * strides[0] + slot * strides[2];
    const int64_t page = c.page_table[b * c.page_columns + slot / c.page_length];
    return page * strides[0] + slot % c.page_length * strides[2];
  }

  int64_t* same_lengths() const {
    int64_t* lengths = reinterpret_cast<int64_t*>(lengths_.data());
    for (int64_t b = 0; b < a_.B; ++b) lengths[b] = a_.end;
    return lengths;
  }

  // From here on each sequence has one token: its queries, its row of the stream, its position.
  void go_on_with_last(AttentionProblem& p) {
    T* queries = values(queries_);
    int64_t* offsets = reinterpret_cast<int64_t*>(offsets_.data());
    for (int64_t b = 0; b < a_.B; ++b) {
      const int64_t t = a_.last[b];
      offsets[b] = start_of(b) + t;
      for (int64_t h = 0; h < w_.heads; ++h) {
        const T* query = row_of(static_cast<const T*>(p.q), p.q_strides, b, h, t);
        std::memcpy(queries + b * attended_width_ + h * p.D, query, size_t(p.D) * sizeof(T));
      }
      const T* row = values(stream_) + (b * a_.T + t) * w_.width;
      std::memmove(values(stream_) + b * w_.width, row, size_t(w_.width) * sizeof(T));
    }
    p.q = queries, p.T = 1, p.q_offsets = offsets;
    p.q_strides[0] = p.q_strides[2] = attended_width_, p.q_strides[1] = p.D;
    tokens_ = a_.B;
  }

  // norm, network: from (stream, branch) to (stream, branch). A parallel one reads the stream without attention's
  // branch, and adds to that.
  bool feed_forward(const DecoderLayer& l) const {
    void* to = w_.parallel ? x_.data() : branch_.data();
    if (!norm(l.feed_forward_norm, w_.parallel ? nullptr : branch_.data())) return false;
    if (!linear(l.up, x_.data(), hidden_.data()) || !activate() || !linear(l.down, activated_.data(), to)) return false;
    if (w_.parallel) {
      parallel_rows(tokens_, w_.width, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * w_.width, here = (end - begin) * w_.width;
        map_row(values(branch_) + at, here, [](vec a, vec b) { return a + b; }, values(branch_) + at, values(x_) + at);
      });
    }
    return norm_alone(l.feed_forward_after_norm, branch_.data(), branch_.data());
  }

  bool activate() const {
    const int64_t F = up_width_ / 2, count = tokens_ * up_width_;
    const GatedForward gated{values(hidden_), values(hidden_) + F, activated_.data(), tokens_, F,
                             up_width_,       up_width_,           w_.dtype,          true};
    switch (w_.activation) {
      case Activation::swiglu:
        return swiglu_forward(gated);
      case Activation::geglu:
        return geglu_forward(gated);
      case Activation::relu:
        parallel_rows(tokens_, up_width_, [&](int64_t begin, int64_t end) {
          const int64_t at = begin * up_width_, here = (end - begin) * up_width_;
          map_row(values(activated_) + at, here, [](vec v) { return max(vec{}, v); }, values(hidden_) + at);
        });
        return true;
      default:
        return gelu_forward(
            {hidden_.data(), activated_.data(), count, w_.dtype, w_.activation == Activation::gelu_tanh});
    }
  }

  const DecoderForward& a_;
  const DecoderWeights& w_;
  int64_t tokens_;  // rows of the stream
  int64_t qkv_width_, attended_width_, up_width_;
  Scratch stream_, branch_, x_, qkv_, qk_, attended_, hidden_, activated_, lse_, queries_, angles_, factors_, offsets_,
      lengths_;
};

}  // namespace

bool decoder_forward(const DecoderForward& a) {
  if (a.B * a.T == 0) return true;
  return with_dtype(a.weights->dtype, [&](auto t) { return Pass<decltype(t)>(a).run(); });
}

}  // namespace llmcore::LLMCORE_LEVEL
