// The CUDA launchers: one for each native op that has a CUDA body. Framework-free: pointers of ../ops.h are the
// device's, scratch memory is the caller's, work is queued on the stream and nothing waits.
//
// A launcher returns a cudaError_t as an int, 0 for success. What a kernel cannot take is refused before it is called,
// by the contract (llmcore/ops/<op>.py). `<op>_workspace` says how many bytes of scratch a launcher needs.
#pragma once

#include <cstddef>

#include "../ops.h"

struct CUstream_st;

namespace llmcore::cuda {

using Stream = CUstream_st*;

int rms_norm_forward(const RmsNormForward& op, Stream stream);
size_t rms_norm_backward_workspace(const RmsNormBackward& op);
int rms_norm_backward(const RmsNormBackward& op, void* workspace, Stream stream);

int layer_norm_forward(const LayerNormForward& op, Stream stream);
size_t layer_norm_backward_workspace(const LayerNormBackward& op);
int layer_norm_backward(const LayerNormBackward& op, void* workspace, Stream stream);

int add_rms_norm_forward(const AddRmsNormForward& op, Stream stream);
size_t add_rms_norm_backward_workspace(const AddRmsNormBackward& op);
int add_rms_norm_backward(const AddRmsNormBackward& op, void* workspace, Stream stream);

int add_layer_norm_forward(const AddLayerNormForward& op, Stream stream);
size_t add_layer_norm_backward_workspace(const AddLayerNormBackward& op);
int add_layer_norm_backward(const AddLayerNormBackward& op, void* workspace, Stream stream);

int softmax_forward(const SoftmaxForward& op, Stream stream);
int softmax_backward(const SoftmaxBackward& op, Stream stream);

size_t cross_entropy_forward_workspace(const CrossEntropyForward& op);
int cross_entropy_forward(const CrossEntropyForward& op, void* workspace, Stream stream);
size_t cross_entropy_backward_workspace(const CrossEntropyBackward& op);
int cross_entropy_backward(const CrossEntropyBackward& op, void* workspace, Stream stream);

int rope(const Rope& op, Stream stream);

int swiglu_forward(const GatedForward& op, Stream stream);
int swiglu_backward(const GatedBackward& op, Stream stream);

size_t attention_forward_workspace(const AttentionForward& op);
int attention_forward(const AttentionForward& op, void* workspace, Stream stream);
// The forward pass on a GPU of compute capability 9.0, which the above calls where it fits: maps of tensors know no
// strides of 0. `p` is one that the contract lets through.
bool attention_fits_sm90(const AttentionProblem& p);
int attention_forward_sm90(const AttentionForward& op, Stream stream);
size_t attention_backward_workspace(const AttentionBackward& op);
int attention_backward(const AttentionBackward& op, void* workspace, Stream stream);

}  // namespace llmcore::cuda
