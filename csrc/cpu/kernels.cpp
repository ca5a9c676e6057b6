// This level's table of kernels.
#include "kernels.h"

namespace llmcore::LLMCORE_LEVEL {

#define LLMCORE_KERNEL_ENTRY(name, arguments) name,
const Kernels kernels = {LLMCORE_KERNELS(LLMCORE_KERNEL_ENTRY)};

}  // namespace llmcore::LLMCORE_LEVEL
