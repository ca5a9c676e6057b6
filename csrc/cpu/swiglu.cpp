// swiglu: rows over threads, one pass.
//
// Forward moves 3 elements and does about 20 operations per element (exp is most of them), backward moves 5 and does
// about 28: bound by memory where the data come from there. gate and up are read by their row strides, so that halves
// of one projection need no copy.
#include "activation.h"

namespace llmcore::LLMCORE_LEVEL {

bool swiglu_forward(const GatedForward& a) {
  return with_dtype(a.dtype, [&](auto t) { return gated_forward<decltype(t)>(a, Silu{}); });
}
bool swiglu_backward(const GatedBackward& a) {
  return with_dtype(a.dtype, [&](auto t) { return gated_backward<decltype(t)>(a, Silu{}); });
}

}  // namespace llmcore::LLMCORE_LEVEL
