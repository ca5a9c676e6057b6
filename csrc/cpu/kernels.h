// The bodies of this level, for its table and for who calls one of them from another.
#pragma once

#include "../ops.h"

namespace llmcore::LLMCORE_LEVEL {

#define LLMCORE_KERNEL_DECLARATION(name, arguments) bool name(const arguments&);
LLMCORE_KERNELS(LLMCORE_KERNEL_DECLARATION)
#undef LLMCORE_KERNEL_DECLARATION

}  // namespace llmcore::LLMCORE_LEVEL
