// rms_norm: a row scaled to a mean square of 1. norm.cuh has the body, its work split and its bounds.
#include "norm.cuh"

namespace llmcore::cuda {

int rms_norm_forward(const RmsNormForward& op, Stream stream) {
  return norm_forward<false, false>({op.x, nullptr, op.weight, nullptr, op.y, nullptr, op.rows, op.width, op.eps,
                                     op.dtype, op.weight_dtype, Dtype::float32},
                                    stream);
}

size_t rms_norm_backward_workspace(const RmsNormBackward& op) {
  return norm_backward_workspace(op.rows, op.width, op.dtype, false);
}

int rms_norm_backward(const RmsNormBackward& op, void* workspace, Stream stream) {
  return norm_backward<false, false>({op.dy, op.x, op.weight, nullptr, op.dx, op.dweight, nullptr, nullptr, op.rows,
                                      op.width, op.eps, op.dtype, op.weight_dtype},
                                     workspace, stream);
}

}  // namespace llmcore::cuda
