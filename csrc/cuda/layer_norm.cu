// layer_norm: a row shifted and scaled to mean 0 and variance 1. norm.cuh has the body, its work split and its bounds.
#include "norm.cuh"

namespace llmcore::cuda {

int layer_norm_forward(const LayerNormForward& op, Stream stream) {
  return norm_forward<true, false>({op.x, nullptr, op.weight, op.bias, op.y, nullptr, op.rows, op.width, op.eps,
                                    op.dtype, op.weight_dtype, op.bias_dtype},
                                   stream);
}

size_t layer_norm_backward_workspace(const LayerNormBackward& op) {
  return norm_backward_workspace(op.rows, op.width, op.dtype, true);
}

int layer_norm_backward(const LayerNormBackward& op, void* workspace, Stream stream) {
  return norm_backward<true, false>({op.dy, op.x, op.weight, nullptr, op.dx, op.dweight, op.dbias, nullptr, op.rows,
                                     op.width, op.eps, op.dtype, op.weight_dtype},
                                    workspace, stream);
}

}  // namespace llmcore::cuda
