#include "loss.h"

namespace llmcore {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_forward(int64_t level, const Tensor& logits, const Tensor& target,
                                                 int64_t ignore_index, double label_smoothing, int64_t reduction) {
  const Tensor input = as_contiguous(logits), labels = as_contiguous(target);
  const auto [rows, classes] = rows_of(input, "logits");
  STD_TORCH_CHECK(classes > 0, "logits: expected at least one class");
  const Reduction how = reduction_of(reduction);
  const int64_t* label = classes_of(labels, rows, classes, ignore_index);
  const Tensor loss = fresh_loss(labels, input.scalar_type(), how);
  const Tensor statistics = fresh({rows, 2}, {2, 1}, ScalarType::Float, place_of(input));
  check_scratch(kernels_of(level, input)
                    .cross_entropy_forward({input.const_data_ptr(), label, loss.mutable_data_ptr(),
                                            floats_of(statistics, true), rows, classes, ignore_index,
                                            float(label_smoothing), how, dtype_of(input, "logits")}));
  return {loss, statistics};
}

Tensor cross_entropy_backward(int64_t level, const Tensor& dloss, const Tensor& logits, const Tensor& target,
                              const Tensor& statistics, int64_t ignore_index, double label_smoothing,
                              int64_t reduction) {
  const Tensor input = as_contiguous(logits), labels = as_contiguous(target), gradient = as_contiguous(dloss);
  const Tensor kept = as_contiguous(statistics);
  const auto [rows, classes] = rows_of(input, "logits");
  STD_TORCH_CHECK(classes > 0, "logits: expected at least one class");
  const Reduction how = reduction_of(reduction);
  const int64_t* label = classes_of(labels, rows, classes, ignore_index);
  STD_TORCH_CHECK(
      gradient.numel() == (how == Reduction::none ? rows : 1) && gradient.scalar_type() == input.scalar_type(),
      "dloss: expected the loss's shape and dtype");
  STD_TORCH_CHECK(kept.numel() == 2 * rows && kept.scalar_type() == ScalarType::Float,
                  "statistics: expected float32 of shape (rows, 2)");
  const Tensor dlogits = fresh_like(input);
  check_scratch(
      kernels_of(level, input)
          .cross_entropy_backward({gradient.const_data_ptr(), input.const_data_ptr(), label,
                                   static_cast<const float*>(kept.const_data_ptr()), dlogits.mutable_data_ptr(), rows,
                                   classes, ignore_index, float(label_smoothing), how, dtype_of(input, "logits")}));
  return dlogits;
}

template <typename Library>
void implement(Library& m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def(
      "cross_entropy_forward(int level, Tensor logits, Tensor target, int ignore_index, float label_smoothing,"
      " int reduction) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(int level, Tensor dloss, Tensor logits, Tensor target, Tensor statistics,"
      " int ignore_index, float label_smoothing, int reduction) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
