// The native ops: every signature with its shapes. The table of contents of csrc/.
//
// Framework-free: pointers, sizes, strides in elements, dtype codes. The caller allocates every output. A body lives in
// cpu/<op>.cpp, is compiled once per instruction-set level (LLMCORE_LEVELS) into a namespace of that name, and is
// reached through the level's Kernels table. Statistics and reductions are float32.
#pragma once

#include <cstdint>

namespace llmcore {

// A level is an instruction set with the number of float32 lanes its vectors have. Best last. A test may build some.
#if defined(LLMCORE_LEVELS)
#elif defined(__x86_64__)
#define LLMCORE_LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define LLMCORE_LEVELS(X) X(portable)
#endif

enum class Dtype : int32_t { float32, bfloat16, float16 };

struct Memory {
  void* data;
  int64_t bytes;
};

// What a kernel needs from its host: threads and scratch memory. Set once, by whoever loads the kernels.
struct Runtime {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on disjoint ranges that cover [0, count), on several threads when count > grain.
  void (*parallel_for)(int64_t count, int64_t grain, Body body, void* context);
  int64_t (*threads)();
  // At least so many bytes, 64-byte aligned and with anything in them, or null when there is no memory.
  Memory (*borrow)(int64_t bytes);
  void (*give_back)(Memory memory);
  int64_t cache_bytes;  // of the last level, for all cores; a result as large as that is stored past the caches
};
extern Runtime runtime;

// y = x / sqrt(mean(x^2) + eps) * weight over the last axis. x, y (rows, width), contiguous; weight (width) or null.
struct RmsNormForward {
  const void* x;
  const void* weight;
  void* y;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// dx (rows, width) and dweight (width, float32) of the above; each may be null when it is not wanted.
struct RmsNormBackward {
  const void* dy;
  const void* x;
  const void* weight;
  void* dx;
  float* dweight;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// y = (x - mean) / sqrt(variance + eps) * weight + bias over the last axis; shapes as in RmsNormForward.
struct LayerNormForward {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype, bias_dtype;
};

// dx (rows, width), dweight and dbias (width, float32) of the above; each may be null when it is not wanted.
struct LayerNormBackward {
  const void* dy;
  const void* x;
  const void* weight;
  void* dx;
  float* dweight;
  float* dbias;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// total = x + residual, rounded, and y = rms_norm(total), all (rows, width), contiguous; total may be x or residual.
struct AddRmsNormForward {
  const void* x;
  const void* residual;
  const void* weight;
  void* y;
  void* total;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype;
};

// norm.x is the total; norm.dx, x's and residual's gradient alike, gets dtotal (rows, width; or null) added to it.
struct AddRmsNormBackward {
  RmsNormBackward norm;
  const void* dtotal;
};

// total = x + residual, rounded, and y = layer_norm(total); shapes as in AddRmsNormForward.
struct AddLayerNormForward {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* y;
  void* total;
  int64_t rows, width;
  float eps;
  Dtype dtype, weight_dtype, bias_dtype;
};

// As AddRmsNormBackward.
struct AddLayerNormBackward {
  LayerNormBackward norm;
  const void* dtotal;
};

// y = exp(x - max) / sum over the last axis. x, y (rows, width), contiguous; y may be x.
struct SoftmaxForward {
  const void* x;
  void* y;
  int64_t rows, width;
  Dtype dtype;
};

// dx = y * (dy - sum(dy * y)) from the forward pass's result y.
struct SoftmaxBackward {
  const void* dy;
  const void* y;
  void* dx;
  int64_t rows, width;
  Dtype dtype;
};

// y = x * Phi(x), or its approximation by tanh. x, y (count); y may be x.
struct GeluForward {
  const void* x;
  void* y;
  int64_t count;
  Dtype dtype;
  bool tanh;
};

// dx = dy * gelu'(x).
struct GeluBackward {
  const void* dy;
  const void* x;
  void* dx;
  int64_t count;
  Dtype dtype;
  bool tanh;
};

// y = silu(gate) * up for swiglu, gelu(gate) * up for geglu. gate and up (rows, width), each by its row stride; y
// (rows, width), contiguous; it may be gate or up. `tanh`: geglu's gelu is the approximation by tanh.
struct GatedForward {
  const void* gate;
  const void* up;
  void* y;
  int64_t rows, width, gate_stride, up_stride;
  Dtype dtype;
  bool tanh;
};

// dgate and dup (rows, width), contiguous, of the above; dy is contiguous.
struct GatedBackward {
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t rows, width, gate_stride, up_stride;
  Dtype dtype;
  bool tanh;
};

// Turns the pairs (r, r + half), or (2r, 2r + 1) when interleaved, of each head's first 2 * half elements by the angle
// of their position, `back` by the opposite one; the rest is copied. x (B, H, T, D) by the strides of (batch, head,
// position), its last axis contiguous; y (B, H, T, D), contiguous, may be x; cos, sin (T, half) or, with a batch stride
// that is not 0, (B, T, half), contiguous, in x's dtype or float32.
struct Rope {
  const void* x;
  const void* cos;
  const void* sin;
  void* y;
  int64_t B, H, T, D, half;
  int64_t x_strides[3], angle_batch_stride;
  Dtype dtype, angle_dtype;
  bool interleaved, back;
};

// y = softmax over the last axis of x * scale + mask, 0 where that is -inf all over. x and y contiguous, `axes` axes of
// the given sizes, the last two (T, S); `rows` is the product of all but the last. y may be x.
struct MaskedSoftmaxForward {
  const void* x;
  void* y;
  int64_t rows, axes;
  const int64_t* sizes;
  const void* mask;  // broadcast to x by its strides (axes), or null; bytes when mask_is_bool, else mask_dtype
  const int64_t* mask_strides;
  bool mask_is_bool, causal;  // causal: row i of T sees the elements j <= S - T + i
  float scale;
  Dtype dtype, mask_dtype;
};

// dx = y * (dy - sum(dy * y)) * scale from the forward pass's result y; all (rows, S), rows a multiple of T.
struct MaskedSoftmaxBackward {
  const void* dy;
  const void* y;
  void* dx;
  int64_t rows, T, S;
  bool causal;
  float scale;
  Dtype dtype;
};

enum class Reduction : int32_t { mean, sum, none };

// logits (rows, classes), contiguous; target (rows), each a class or ignore_index, which the caller checks; loss one
// value, or (rows) without reduction, in the logits' dtype. statistics (rows, 2), for the backward pass: a row's
// maximum and log(sum(exp(logits - maximum))); 0 where it is ignored.
struct CrossEntropyForward {
  const void* logits;
  const int64_t* target;
  void* loss;
  float* statistics;
  int64_t rows, classes, ignore_index;
  float label_smoothing;
  Reduction reduction;
  Dtype dtype;
};

// dlogits (rows, classes) of the above; dloss has the loss's shape and dtype.
struct CrossEntropyBackward {
  const void* dloss;
  const void* logits;
  const int64_t* target;
  const float* statistics;
  void* dlogits;
  int64_t rows, classes, ignore_index;
  float label_smoothing;
  Reduction reduction;
  Dtype dtype;
};

// The loss of logits = x weight^T + bias, which are never whole. x (rows, width), weight (classes, width), contiguous;
// bias (classes) or null; the rest as in CrossEntropyForward. Where dx (rows, width), dweight (classes, width) or dbias
// (classes) is not null, all are float32, the reduction is sum or mean, and the gradients of the loss are made as well.
struct LinearCrossEntropyForward {
  const void* x;
  const void* weight;
  const void* bias;
  const int64_t* target;
  void* loss;
  float* statistics;
  float* dx;
  float* dweight;
  float* dbias;
  int64_t rows, width, classes, ignore_index;
  float label_smoothing;
  Reduction reduction;
  Dtype dtype, bias_dtype;
};

// dx (rows, width), dweight (classes, width) and dbias (classes, float32) of the above; each may be null when it is not
// wanted.
struct LinearCrossEntropyBackward {
  const void* dloss;
  const void* x;
  const void* weight;
  const void* bias;
  const int64_t* target;
  const float* statistics;
  void* dx;
  void* dweight;
  float* dbias;
  int64_t rows, width, classes, ignore_index;
  float label_smoothing;
  Reduction reduction;
  Dtype dtype, bias_dtype;
};

constexpr int64_t NO_OFFSET = INT64_MIN;

// What keys and values are kept in beside queries: their dtype, or in fewer bits beside float32 ones. A row of int8
// stands for its integers times one float32, its scale.
enum class KvDtype : int32_t { same, bfloat16, int8 };

// Scores of attention, shared by both passes. Query head h reads key/value head h / (H / G). The last axis of q, k, v
// is contiguous; the strides are those of (batch, head, position).
struct AttentionProblem {
  const void* q;  // (B, H, T, D)
  const void* k;  // (B, G, S, D)
  const void* v;  // (B, G, S, Dv)
  int64_t B, H, G, T, S, D, Dv;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  Dtype dtype;
  KvDtype kv_dtype;      // `same` in the backward pass
  const float* k_scale;  // with int8 (B, G, S), in pages (pages, G, page_length); else null
  const float* v_scale;
  int64_t k_scale_strides[3], v_scale_strides[3];

  const void* mask;  // broadcast to (B, H, T, S) by its strides, or null; bytes when mask_is_bool, else mask_dtype
  int64_t mask_strides[4];
  bool mask_is_bool;
  Dtype mask_dtype;

  // Sequences packed one behind the other: no batch axis, q (H, T, D), k (G, S, D), v (G, S, Dv), lse (H, T), batch
  // strides 0; sequence b is [q_ends[b], q_ends[b + 1]) of T and [k_ends[b], k_ends[b + 1]) of S. Both (B + 1) or null.
  const int64_t* q_ends;
  const int64_t* k_ends;
  // Keys in pages: k (pages, G, page_length, D) and v alike, key j of sequence b at place j % page_length of the page
  // page_table[b][j / page_length]; S = page_columns * page_length. (B, page_columns), contiguous, or null.
  const int64_t* page_table;
  int64_t page_columns, page_length;

  const int64_t* kv_lengths;  // (B) or null: S
  const int64_t* q_offsets;   // (B) or null: q_offset for all, or kv_length - T when that is NO_OFFSET
  int64_t q_offset;
  bool causal;
  int64_t window_left, window_right;  // negative: unbounded
  float scale, softcap;               // softcap 0: none
  const float* sinks;                 // (H) or null
  const float* alibi_slopes;          // by strides (batch, head), or null
  int64_t alibi_strides[2];
  uint32_t dropout_threshold;  // a score is dropped when its hash is below it; 0: no dropout
  uint64_t dropout_seed;
};

struct AttentionForward {
  AttentionProblem problem;
  void* out;  // (B, H, T, Dv) by its strides
  int64_t out_strides[3];
  float* lse;  // (B, H, T), contiguous
};

// Strides are those of (batch, head, position). dsinks and dslopes (B, H) are summed over queries only; dmask, zeros
// before, has the mask's sizes, contiguous but for a stride of 0 along each axis of one element. These may be null, as
// dlse may be.
struct AttentionBackward {
  AttentionProblem problem;
  const void* out;    // (B, H, T, Dv)
  const void* dout;   // (B, H, T, Dv)
  const float* lse;   // (B, H, T), contiguous
  const float* dlse;  // (B, H, T), contiguous
  void* dq;           // (B, H, T, D)
  void* dk;           // (B, G, S, D)
  void* dv;           // (B, G, S, Dv)
  float* dsinks;
  float* dslopes;
  float* dmask;
  int64_t dmask_strides[4];
  int64_t out_strides[3], dout_strides[3], dq_strides[3], dk_strides[3], dv_strides[3];
};

// Rows of a cache of keys or values: y = x in kv_dtype (`same` is float32), to nearest, ties to even. In int8 a row is
// divided by its scale first, max|x| / 127; one of zeros has the scale 0, one with inf or NaN the scale NaN, and zeros.
// x and y (B, G, T, D), scale (B, G, T) or null, by strides of (batch, head, position), the last axis contiguous.
struct StoreRows {
  const float* x;
  void* y;
  float* scale;
  int64_t B, G, T, D;
  int64_t x_strides[3], y_strides[3], scale_strides[3];
  KvDtype kv_dtype;
};

// Not ops, but the limits of this machine that the benchmarks divide by; each keeps every thread busy.
//
// Independent chains of multiply-adds in registers: v = v * factor + term, or, with bfloat16 pairs, v plus the products
// of factor's and term's bits. `operations`: how many floating-point operations that was; 0 where this level has no
// such instruction. `result` (threads) only keeps the work from being left out.
struct RooflineChains {
  float* result;
  int64_t* operations;
  int64_t rounds;
  float factor, term;
};

// Sums of x (count), `passes` times over; `result` (threads).
struct RooflineRead {
  const float* x;
  float* result;
  int64_t count, passes;
};

// y = x (count), `passes` times over; with `past_caches` by stores that do not fetch y's lines, both then aligned to 64
// bytes.
struct RooflineCopy {
  const float* x;
  float* y;
  int64_t count, passes;
  bool past_caches;
};

// y = x weight^T + bias. x (M, K), y (M, N), weight (N, K), contiguous; bias (N) or null. Beside a weight in bfloat16 x
// is rounded to bfloat16 first, if it is not that.
struct LinearForward {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  int64_t M, N, K;
  Dtype dtype, weight_dtype, bias_dtype;
};

// dx (M, K), dweight (N, K) and dbias (N, float32) of the above, all else in one dtype; each may be null when it is not
// wanted.
struct LinearBackward {
  const void* dy;
  const void* x;
  const void* weight;
  void* dx;
  void* dweight;
  float* dbias;
  int64_t M, N, K;
  Dtype dtype;
};

// y = x weight^T + bias with the weight in int8 or int4 and x (M, K) rounded to int8, row by row and group by group;
// the contract, llmcore/ops/linear.py, says how. y (M, N), bias (N) or null; K is a multiple of the group, a power of 2
// of at least 16.
//
// The weight lies in panels of 16 outputs, the last one padded. In a panel the 16 outputs' bytes for each four
// neighbours along K are side by side: values (N / 16, K / 4, 16, 4), 128 more than they stand for in int8. In int4
// such a block of 64 bytes holds eight neighbours, the first four in the low halves, the second four in the high ones:
// values (N / 16, K / 8, 16, 4). scales and minimums: float16 (N / 16, K / group, 16). A weight is scale * q + minimum;
// without minimums (null) it is scale * q in int8, scale * (q - 8) in int4.
enum class QuantizedFormat : int32_t { int8, int4 };
struct LinearQuantizedForward {
  const void* x;
  const uint8_t* values;
  const void* scales;
  const void* minimums;
  const void* bias;
  void* y;
  int64_t M, N, K, group;
  Dtype dtype, bias_dtype;
  QuantizedFormat format;
};

// The weight (N, K) of a linear layer with its bias (N) or null: plain, as LinearForward has it, or, with a group, as
// LinearQuantizedForward.
struct LinearWeight {
  const void* values;
  const void* scales;
  const void* minimums;
  const void* bias;
  int64_t N, K, group;
  Dtype dtype, bias_dtype;
  QuantizedFormat format;
};

// Of a layer norm, or without bias of an RMS norm; both in the activations' dtype. Without weight there is no norm.
struct NormWeight {
  const void* weight;
  const void* bias;
};

// llmcore/models/block.py: one layer of a decoder. qkv has the rows of all query, key and value heads; up (F, C), or
// gate and up (2 F, C) when it is gated.
struct DecoderLayer {
  NormWeight attention_norm;
  LinearWeight qkv, output;
  NormWeight feed_forward_norm;
  LinearWeight up, down;
  NormWeight q_norm, k_norm;                                 // of each head's D, before positions; RMS norms
  NormWeight attention_after_norm, feed_forward_after_norm;  // of a branch, before it is added
  int64_t window;                                            // keys that a query sees; 0: all
  bool has_window_angles;                                    // its angles are window_cos and window_sin
};

enum class Activation : int { swiglu, geglu, gelu, gelu_tanh, relu };  // geglu in the tanh form

struct DecoderWeights {
  LinearWeight embedding, head;    // (V, C); the head is the embedding where they are tied
  const void* position_embedding;  // (context, C) in the activations' dtype, or null: rotary positions
  const DecoderLayer* layers;
  NormWeight norm;
  int64_t layer_count, width, heads, kv_heads, head_width;
  int64_t rotary_width;                        // R: so many of a head's first values are turned, in halves
  float eps, scale, softcap, embedding_scale;  // scale and softcap (0: none) of the scores
  bool plus_one;                               // RMS norms multiply by 1 + weight
  bool parallel;                               // the feed-forward network reads the same stream as attention
  bool interleaved_heads;                      // qkv's rows are query, key and value of a head, then of the next one
  Activation activation;
  Dtype dtype;  // of the activations
};

// What a decoder's layers keep: keys and values (B, G, capacity, D) of each layer by the strides of (batch, head,
// position), or pages as in AttentionProblem, whose strides are those of (page, head, place).
struct DecoderCache {
  void* const* keys;
  void* const* values;
  float* const* key_scales;  // of each layer, with int8; by scale_strides
  float* const* value_scales;
  int64_t strides[3], scale_strides[3];
  KvDtype kv_dtype;  // `same` unless the activations are float32
  const int64_t* page_table;
  int64_t page_columns, page_length;
};

// Logits of the T new tokens of B sequences, whose keys and values go into the cache: those of token t of sequence b to
// slot starts[b] + t, its position being positions[b] + t. logits (B, T, V) or, with `last` (B), those of the tokens
// last[b] only, (B, V). cos and sin: of every position from 0 on, float32 (positions, R / 2); window_cos and window_sin
// likewise, or null.
struct DecoderForward {
  const DecoderWeights* weights;
  DecoderCache cache;
  const int64_t* ids;         // (B, T)
  const int64_t* starts;      // (B) or null: `start`
  const int64_t* positions;   // (B) or null: as the slots
  const int64_t* kv_lengths;  // (B), slots with the new ones, or null: `end`
  const int64_t* last;
  const float* cos;
  const float* sin;
  const float* window_cos;
  const float* window_sin;
  void* logits;
  int64_t B, T, start, end;
};

// The bodies of one level. Each returns false when scratch memory could not be had, true otherwise.
#define LLMCORE_KERNELS(X)                                     \
  X(rms_norm_forward, RmsNormForward)                          \
  X(rms_norm_backward, RmsNormBackward)                        \
  X(layer_norm_forward, LayerNormForward)                      \
  X(layer_norm_backward, LayerNormBackward)                    \
  X(add_rms_norm_forward, AddRmsNormForward)                   \
  X(add_rms_norm_backward, AddRmsNormBackward)                 \
  X(add_layer_norm_forward, AddLayerNormForward)               \
  X(add_layer_norm_backward, AddLayerNormBackward)             \
  X(softmax_forward, SoftmaxForward)                           \
  X(softmax_backward, SoftmaxBackward)                         \
  X(gelu_forward, GeluForward)                                 \
  X(gelu_backward, GeluBackward)                               \
  X(geglu_forward, GatedForward)                               \
  X(geglu_backward, GatedBackward)                             \
  X(swiglu_forward, GatedForward)                              \
  X(swiglu_backward, GatedBackward)                            \
  X(linear_forward, LinearForward)                             \
  X(linear_backward, LinearBackward)                           \
  X(linear_quantized_forward, LinearQuantizedForward)          \
  X(rope, Rope)                                                \
  X(masked_softmax_forward, MaskedSoftmaxForward)              \
  X(masked_softmax_backward, MaskedSoftmaxBackward)            \
  X(cross_entropy_forward, CrossEntropyForward)                \
  X(cross_entropy_backward, CrossEntropyBackward)              \
  X(linear_cross_entropy_forward, LinearCrossEntropyForward)   \
  X(linear_cross_entropy_backward, LinearCrossEntropyBackward) \
  X(attention_forward, AttentionForward)                       \
  X(attention_backward, AttentionBackward)                     \
  X(store_rows, StoreRows)                                     \
  X(decoder_forward, DecoderForward)                           \
  X(roofline_fma, RooflineChains)                              \
  X(roofline_bf16_pairs, RooflineChains)                       \
  X(roofline_read, RooflineRead)                               \
  X(roofline_copy, RooflineCopy)

struct Kernels {
#define LLMCORE_KERNEL_MEMBER(name, arguments) bool (*name)(const arguments&);
  LLMCORE_KERNELS(LLMCORE_KERNEL_MEMBER)
#undef LLMCORE_KERNEL_MEMBER
};

#define LLMCORE_DECLARE_LEVEL(level) \
  namespace level {                  \
  extern const Kernels kernels;      \
  }
LLMCORE_LEVELS(LLMCORE_DECLARE_LEVEL)
#undef LLMCORE_DECLARE_LEVEL

}  // namespace llmcore
