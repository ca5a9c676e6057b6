// This level's table of kernels.
#include "../ops.h"

namespace llmcore::LLMCORE_LEVEL {

bool rms_norm_forward(const RmsNormForward&);
bool rms_norm_backward(const RmsNormBackward&);

const Kernels kernels = {
    rms_norm_forward,
    rms_norm_backward,
};

}  // namespace llmcore::LLMCORE_LEVEL
