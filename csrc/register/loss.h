// What the two cross entropies' files share: targets, reductions, and a fresh loss.
#pragma once

#include "../register.h"

namespace llmcore {

// The class numbers of `rows` rows, each checked: a kernel reads the logit that a target points to.
inline const int64_t* classes_of(const Tensor& target, int64_t rows, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous() && target.numel() == rows,
                  "target: expected contiguous int64, one for each row");
  const int64_t* values = static_cast<const int64_t*>(target.const_data_ptr());
  if (is_cuda(target)) return values;  // the kernels check them: a wrong one is a device-side assertion, as in torch
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK((values[r] >= 0 && values[r] < classes) || values[r] == ignore_index, "target: got ", values[r],
                    ", expected 0 to ", classes - 1, ", or ignore_index ", ignore_index);
  }
  return values;
}

inline Reduction reduction_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "reduction: expected 0 (mean), 1 (sum) or 2 (none), got ", code);
  return Reduction(code);
}

// A fresh loss: a scalar, or target's shape without reduction.
inline Tensor fresh_loss(const Tensor& target, ScalarType type, Reduction reduction) {
  const int64_t axes = reduction == Reduction::none ? target.dim() : 0;
  return fresh(axes, target.sizes().data(), target.strides().data(), code_of(type), place_of(target));
}

}  // namespace llmcore
