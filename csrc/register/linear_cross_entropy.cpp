#include "loss.h"

namespace llmcore {
namespace {

// x as rows, the weight and the target, checked against each other.
struct Inputs {
  Inputs(const Tensor& x, const Tensor& weight, const Tensor& target, const OptionalTensor& bias, int64_t ignore_index)
      : input(as_contiguous(x)), values(as_contiguous(weight)), labels(as_contiguous(target)) {
    STD_TORCH_CHECK(input.dim() >= 1 && values.dim() == 2 && values.size(1) == input.size(input.dim() - 1),
                    "weight: expected (V, C), C the last axis of x");
    classes = values.size(0), width = values.size(1), rows = labels.numel();
    STD_TORCH_CHECK(classes > 0 && input.numel() == rows * width, "target: expected one class for each row of x");
    dtype = dtype_of(input, "x");
    STD_TORCH_CHECK(dtype_of(values, "weight") == dtype, "weight: expected x's dtype");
    label = classes_of(labels, rows, classes, ignore_index);
    added = Parameter(bias, classes, "bias");
  }
  Tensor input, values, labels;
  int64_t rows, width, classes;
  Dtype dtype;
  const int64_t* label;
  Parameter added{std::nullopt, 0, "bias"};
};

// The gradients that are wanted are those of a loss that is one number, in float32; else all of them are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    int64_t level, const Tensor& x, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, int64_t reduction, bool want_dx, bool want_dweight, bool want_dbias) {
  const Inputs in(x, weight, target, bias, ignore_index);
  const Reduction how = reduction_of(reduction);
  STD_TORCH_CHECK(!(want_dx || want_dweight || want_dbias) || (how != Reduction::none && in.dtype == Dtype::float32),
                  "reduction: gradients come with the loss where it is sum or mean, in float32");
  const Tensor loss = fresh_loss(in.labels, in.input.scalar_type(), how);
  const Tensor statistics = fresh({in.rows, 2}, {2, 1}, ScalarType::Float);
  const Tensor dx = fresh_like(in.input, want_dx), dweight = fresh_like(in.values, want_dweight);
  const Tensor dbias = float_vector(want_dbias, in.classes);
  check_scratch(kernels_of(level).linear_cross_entropy_forward(
      {in.input.const_data_ptr(), in.values.const_data_ptr(), in.added.data, in.label, loss.mutable_data_ptr(),
       floats_of(statistics, true), floats_of(dx, want_dx), floats_of(dweight, want_dweight),
       floats_of(dbias, want_dbias), in.rows, in.width, in.classes, ignore_index, float(label_smoothing), how, in.dtype,
       in.added.dtype}));
  return {loss, statistics, dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(int64_t level, const Tensor& dloss, const Tensor& x,
                                                                 const Tensor& weight, const Tensor& target,
                                                                 const OptionalTensor& bias, const Tensor& statistics,
                                                                 int64_t ignore_index, double label_smoothing,
                                                                 int64_t reduction, bool need_dx, bool need_dweight,
                                                                 bool need_dbias) {
  const Inputs in(x, weight, target, bias, ignore_index);
  const Reduction how = reduction_of(reduction);
  const Tensor gradient = as_contiguous(dloss), kept = as_contiguous(statistics);
  STD_TORCH_CHECK(gradient.numel() == (how == Reduction::none ? in.rows : 1) && dtype_of(gradient, "dloss") == in.dtype,
                  "dloss: expected the loss's shape and dtype");
  STD_TORCH_CHECK(kept.scalar_type() == ScalarType::Float && kept.numel() == 2 * in.rows,
                  "statistics: expected float32 of shape (rows, 2)");
  const Tensor dx = fresh_like(in.input, need_dx), dweight = fresh_like(in.values, need_dweight);
  const Tensor dbias = float_vector(need_dbias, in.classes);
  check_scratch(kernels_of(level).linear_cross_entropy_backward(
      {gradient.const_data_ptr(), in.input.const_data_ptr(), in.values.const_data_ptr(), in.added.data, in.label,
       static_cast<const float*>(kept.const_data_ptr()), need_dx ? dx.mutable_data_ptr() : nullptr,
       need_dweight ? dweight.mutable_data_ptr() : nullptr, floats_of(dbias, need_dbias), in.rows, in.width, in.classes,
       ignore_index, float(label_smoothing), how, in.dtype, in.added.dtype}));
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def(
      "linear_cross_entropy_forward(int level, Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index,"
      " float label_smoothing, int reduction, bool want_dx, bool want_dweight, bool want_dbias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(int level, Tensor dloss, Tensor x, Tensor weight, Tensor target, Tensor? bias,"
      " Tensor statistics, int ignore_index, float label_smoothing, int reduction, bool need_dx, bool need_dweight,"
      " bool need_dbias) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace llmcore
