// add_layer_norm: x + residual, and its layer_norm, in one pass. norm.cuh has the body, its work split and its bounds.
#include "norm.cuh"

namespace llmcore::cuda {

int add_layer_norm_forward(const AddLayerNormForward& op, Stream stream) {
  return norm_forward<true, true>({op.x, op.residual, op.weight, op.bias, op.y, op.total, op.rows, op.width, op.eps,
                                   op.dtype, op.weight_dtype, op.bias_dtype},
                                  stream);
}

size_t add_layer_norm_backward_workspace(const AddLayerNormBackward& op) {
  return norm_backward_workspace(op.norm.rows, op.norm.width, op.norm.dtype, true);
}

int add_layer_norm_backward(const AddLayerNormBackward& op, void* workspace, Stream stream) {
  return norm_backward<true, true>(
      {op.norm.dy, op.norm.x, op.norm.weight, op.dtotal, op.norm.dx, op.norm.dweight, op.norm.dbias, nullptr,
       op.norm.rows, op.norm.width, op.norm.eps, op.norm.dtype, op.norm.weight_dtype},
      workspace, stream);
}

}  // namespace llmcore::cuda
