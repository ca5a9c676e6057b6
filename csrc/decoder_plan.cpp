// A decoder's weights at their places in memory, bound once, and the pass over them: what llmcore/models/plan.py calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels.h"
#include "team.h"

namespace py = pybind11;

namespace llmcore {
namespace {

using Address = uintptr_t;  // of a tensor's data that Python keeps alive; 0: none

template <class T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

template <class T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> result;
  for (const Address address : addresses) result.push_back(reinterpret_cast<T*>(address));
  return result;
}

class DecoderPlan {
 public:
  DecoderPlan(int64_t level, DecoderWeights weights, std::vector<DecoderLayer> layers)
      : kernels_(kernels_at(level)), layers_(std::move(layers)), weights_(weights) {
    if (kernels_ == nullptr) throw std::invalid_argument("level: this machine doesn't run it");
    weights_.layers = layers_.data(), weights_.layer_count = int64_t(layers_.size());
    for (const DecoderLayer& layer : layers_) {
      for (const LinearWeight* w : {&layer.qkv, &layer.output, &layer.up, &layer.down}) products_ += w->N * w->K;
    }
    products_ += weights_.head.N * weights_.head.K;
  }
  DecoderPlan(const DecoderPlan&) = delete;
  DecoderPlan& operator=(const DecoderPlan&) = delete;

  // The buffers of each layer: keys, values and, with int8, the scales of either.
  void forward(DecoderForward pass, const std::array<std::vector<Address>, 4>& buffers) const {
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i].size() != (i < 2 || pass.cache.kv_dtype == KvDtype::int8 ? layers_.size() : 0)) {
        throw std::invalid_argument("buffers: expected one for each layer");
      }
    }
    for (int64_t i = 0; i < pass.B * pass.T; ++i) {
      if (pass.ids[i] < 0 || pass.ids[i] >= weights_.embedding.N) {
        throw py::index_error("ids: got " + std::to_string(pass.ids[i]) + ", expected 0 to " +
                              std::to_string(weights_.embedding.N - 1));
      }
    }
    const std::vector<void*> keys = pointers<void>(buffers[0]), values = pointers<void>(buffers[1]);
    const std::vector<float*> key_scales = pointers<float>(buffers[2]), value_scales = pointers<float>(buffers[3]);
    pass.weights = &weights_;
    pass.cache.keys = keys.data(), pass.cache.values = values.data();
    pass.cache.key_scales = key_scales.data(), pass.cache.value_scales = value_scales.data();
    const py::gil_scoped_release others_may_run;
    const int64_t threads = pass.B * pass.T * products_ < WORTH_A_TEAM ? 1 : runtime.threads();
    bool ok = false;
    as_team(runtime.parallel_for, threads, [&] { ok = kernels_->decoder_forward(pass); });
    if (!ok) throw std::bad_alloc();
  }

 private:
  // Multiply-adds of a pass. In one with fewer, most parts are too small to be shared: a part that isn't asks for
  // threads by itself.
  static constexpr int64_t WORTH_A_TEAM = int64_t{1} << 22;

  const Kernels* kernels_;
  std::vector<DecoderLayer> layers_;
  DecoderWeights weights_;
  int64_t products_ = 0;  // of a token, in multiply-adds
};

}  // namespace

void bind_decoder_plan(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);

  py::enum_<KvDtype>(m, "KvDtype")
      .value("same", KvDtype::same)
      .value("bfloat16", KvDtype::bfloat16)
      .value("int8", KvDtype::int8);

  py::enum_<Activation>(m, "Activation")
      .value("swiglu", Activation::swiglu)
      .value("geglu", Activation::geglu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("relu", Activation::relu);

  py::class_<LinearWeight>(m, "LinearWeight", "A weight (N, K) and its bias; group 0: a plain one.")
      .def(py::init([](Address values, Address scales, Address minimums, Address bias, int64_t N, int64_t K,
                       int64_t group, Dtype dtype, Dtype bias_dtype, bool int4) {
             return LinearWeight{at<void>(values),
                                 at<void>(scales),
                                 at<void>(minimums),
                                 at<void>(bias),
                                 N,
                                 K,
                                 group,
                                 dtype,
                                 bias_dtype,
                                 int4 ? QuantizedFormat::int4 : QuantizedFormat::int8};
           }),
           py::kw_only(), py::arg("values"), py::arg("scales"), py::arg("minimums"), py::arg("bias"), py::arg("N"),
           py::arg("K"), py::arg("group"), py::arg("dtype"), py::arg("bias_dtype"), py::arg("int4"));

  py::class_<NormWeight>(m, "NormWeight", "Of a layer norm, or without bias of an RMS norm.")
      .def(py::init([](Address weight, Address bias) { return NormWeight{at<void>(weight), at<void>(bias)}; }),
           py::kw_only(), py::arg("weight"), py::arg("bias"));

  py::class_<DecoderLayer>(m, "DecoderLayer")
      .def(py::init([](NormWeight attention_norm, LinearWeight qkv, LinearWeight output, NormWeight feed_forward_norm,
                       LinearWeight up, LinearWeight down, NormWeight q_norm, NormWeight k_norm,
                       NormWeight attention_after_norm, NormWeight feed_forward_after_norm, int64_t window,
                       bool has_window_angles) {
             return DecoderLayer{attention_norm,
                                 qkv,
                                 output,
                                 feed_forward_norm,
                                 up,
                                 down,
                                 q_norm,
                                 k_norm,
                                 attention_after_norm,
                                 feed_forward_after_norm,
                                 window,
                                 has_window_angles};
           }),
           py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("output"), py::arg("feed_forward_norm"),
           py::arg("up"), py::arg("down"), py::arg("q_norm"), py::arg("k_norm"), py::arg("attention_after_norm"),
           py::arg("feed_forward_after_norm"), py::arg("window"), py::arg("has_window_angles"));

  py::class_<DecoderPlan>(m, "DecoderPlan", "csrc/ops.h, DecoderWeights; addresses must stay valid.")
      .def(py::init([](int64_t level, LinearWeight embedding, LinearWeight head, Address position_embedding,
                       std::vector<DecoderLayer> layers, NormWeight norm, int64_t width, int64_t heads,
                       int64_t kv_heads, int64_t head_width, int64_t rotary_width, float eps, float scale,
                       float softcap, float embedding_scale, bool plus_one, bool parallel, bool interleaved_heads,
                       Activation activation, Dtype dtype) {
             DecoderWeights w{};
             w.embedding = embedding, w.head = head, w.position_embedding = at<void>(position_embedding);
             w.norm = norm, w.width = width, w.heads = heads, w.kv_heads = kv_heads, w.head_width = head_width;
             w.rotary_width = rotary_width, w.parallel = parallel, w.interleaved_heads = interleaved_heads;
             w.eps = eps, w.scale = scale, w.softcap = softcap, w.embedding_scale = embedding_scale;
             w.plus_one = plus_one, w.activation = activation, w.dtype = dtype;
             return std::make_unique<DecoderPlan>(level, w, std::move(layers));
           }),
           py::kw_only(), py::arg("level"), py::arg("embedding"), py::arg("head"), py::arg("position_embedding"),
           py::arg("layers"), py::arg("norm"), py::arg("width"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("head_width"), py::arg("rotary_width"), py::arg("eps"), py::arg("scale"), py::arg("softcap"),
           py::arg("embedding_scale"), py::arg("plus_one"), py::arg("parallel"), py::arg("interleaved_heads"),
           py::arg("activation"), py::arg("dtype"))
      .def(
          "forward",
          [](const DecoderPlan& plan, Address ids, Address logits, int64_t batch, int64_t tokens, int64_t start,
             int64_t end, Address starts, Address positions, Address kv_lengths, Address last, Address cos, Address sin,
             Address window_cos, Address window_sin, const std::array<std::vector<Address>, 4>& buffers,
             KvDtype kv_dtype, const std::array<int64_t, 3>& cache_strides, const std::array<int64_t, 3>& scale_strides,
             Address page_table, int64_t page_columns, int64_t page_length) {
            DecoderForward a{};
            a.ids = at<int64_t>(ids), a.logits = reinterpret_cast<void*>(logits);
            a.B = batch, a.T = tokens, a.start = start, a.end = end;
            a.starts = at<int64_t>(starts), a.positions = at<int64_t>(positions),
            a.kv_lengths = at<int64_t>(kv_lengths), a.last = at<int64_t>(last);
            a.cos = at<float>(cos), a.sin = at<float>(sin);
            a.window_cos = at<float>(window_cos), a.window_sin = at<float>(window_sin);
            for (size_t i = 0; i < 3; ++i)
              a.cache.strides[i] = cache_strides[i], a.cache.scale_strides[i] = scale_strides[i];
            a.cache.kv_dtype = kv_dtype;
            a.cache.page_table = at<int64_t>(page_table);
            a.cache.page_columns = page_columns, a.cache.page_length = page_length;
            plan.forward(a, buffers);
          },
          py::kw_only(), py::arg("ids"), py::arg("logits"), py::arg("batch"), py::arg("tokens"), py::arg("start"),
          py::arg("end"), py::arg("starts"), py::arg("positions"), py::arg("kv_lengths"), py::arg("last"),
          py::arg("cos"), py::arg("sin"), py::arg("window_cos"), py::arg("window_sin"), py::arg("buffers"),
          py::arg("kv_dtype"), py::arg("cache_strides"), py::arg("scale_strides"), py::arg("page_table"),
          py::arg("page_columns"), py::arg("page_length"), "csrc/ops.h, DecoderForward.");
}

}  // namespace llmcore
