// add_rms_norm: x + residual, and its rms_norm, in one pass. norm.cuh has the body, its work split and its bounds.
#include "norm.cuh"

namespace llmcore::cuda {

int add_rms_norm_forward(const AddRmsNormForward& op, Stream stream) {
  return norm_forward<false, true>({op.x, op.residual, op.weight, nullptr, op.y, op.total, op.rows, op.width, op.eps,
                                    op.dtype, op.weight_dtype, Dtype::float32},
                                   stream);
}

size_t add_rms_norm_backward_workspace(const AddRmsNormBackward& op) {
  return norm_backward_workspace(op.norm.rows, op.norm.width, op.norm.dtype, false);
}

int add_rms_norm_backward(const AddRmsNormBackward& op, void* workspace, Stream stream) {
  return norm_backward<false, true>(
      {op.norm.dy, op.norm.x, op.norm.weight, op.dtotal, op.norm.dx, op.norm.dweight, nullptr, nullptr, op.norm.rows,
       op.norm.width, op.norm.eps, op.norm.dtype, op.norm.weight_dtype},
      workspace, stream);
}

}  // namespace llmcore::cuda
