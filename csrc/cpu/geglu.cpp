// geglu: rows over threads, one pass, as swiglu; its gelu is that of gelu.cpp.
#include "activation.h"

namespace llmcore::LLMCORE_LEVEL {

// 3 dtypes x 2 approximations = 6 builds of each.
bool geglu_forward(const GatedForward& a) {
  return with_dtype(a.dtype, [&](auto t) {
    return with_gelu<decltype(t)>(a.tanh, [&](auto gelu) { return gated_forward<decltype(t)>(a, gelu); });
  });
}
bool geglu_backward(const GatedBackward& a) {
  return with_dtype(a.dtype, [&](auto t) {
    return with_gelu<decltype(t)>(a.tanh, [&](auto gelu) { return gated_backward<decltype(t)>(a, gelu); });
  });
}

}  // namespace llmcore::LLMCORE_LEVEL
