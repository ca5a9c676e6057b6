// The CUDA launchers as a table of kernels: each queues its work on the current stream of its tensors' device. Built
// where there is nvcc and a torch with CUDA.
#ifdef LLMCORE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "../register.h"

namespace llmcore {
namespace {

thread_local int32_t device = 0;  // of the call that is being made

cuda::Stream current_stream() {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

bool check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "a CUDA kernel did not start: cudaError_t ", error);
  return true;
}

template <typename Op, int (*LAUNCH)(const Op&, cuda::Stream)>
bool run(const Op& op) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  return check_launch(LAUNCH(op, current_stream()));
}

// Scratch memory is given back when the launch is queued: torch hands it out again to the same stream only.
template <typename Op, int (*LAUNCH)(const Op&, void*, cuda::Stream), size_t (*WORKSPACE)(const Op&)>
bool run_with_scratch(const Op& op) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor scratch =
      fresh({int64_t(WORKSPACE(op))}, {1}, ScalarType::Byte, Place{aoti_torch_device_type_cuda(), device});
  return check_launch(LAUNCH(op, scratch.mutable_data_ptr(), current_stream()));
}

Kernels table() {
  Kernels kernels{};
#define LLMCORE_RUN(name, Op) kernels.name = run<Op, cuda::name>
#define LLMCORE_RUN_WITH_SCRATCH(name, Op) kernels.name = run_with_scratch<Op, cuda::name, cuda::name##_workspace>
  LLMCORE_RUN(rms_norm_forward, RmsNormForward);
  LLMCORE_RUN_WITH_SCRATCH(rms_norm_backward, RmsNormBackward);
  LLMCORE_RUN(layer_norm_forward, LayerNormForward);
  LLMCORE_RUN_WITH_SCRATCH(layer_norm_backward, LayerNormBackward);
  LLMCORE_RUN(add_rms_norm_forward, AddRmsNormForward);
  LLMCORE_RUN_WITH_SCRATCH(add_rms_norm_backward, AddRmsNormBackward);
  LLMCORE_RUN(add_layer_norm_forward, AddLayerNormForward);
  LLMCORE_RUN_WITH_SCRATCH(add_layer_norm_backward, AddLayerNormBackward);
  LLMCORE_RUN(softmax_forward, SoftmaxForward);
  LLMCORE_RUN(softmax_backward, SoftmaxBackward);
  LLMCORE_RUN_WITH_SCRATCH(cross_entropy_forward, CrossEntropyForward);
  LLMCORE_RUN_WITH_SCRATCH(cross_entropy_backward, CrossEntropyBackward);
  LLMCORE_RUN(rope, Rope);
  LLMCORE_RUN(swiglu_forward, GatedForward);
  LLMCORE_RUN(swiglu_backward, GatedBackward);
  LLMCORE_RUN_WITH_SCRATCH(attention_forward, AttentionForward);
  LLMCORE_RUN_WITH_SCRATCH(attention_backward, AttentionBackward);
#undef LLMCORE_RUN
#undef LLMCORE_RUN_WITH_SCRATCH
  return kernels;
}

}  // namespace

const Kernels& cuda_kernels(int32_t index) {
  static const Kernels kernels = table();
  device = index;
  return kernels;
}

}  // namespace llmcore
#endif
