#include "../register.h"

namespace llmcore {
namespace {

void geglu_forward_out(int64_t level, const Tensor& gate, const Tensor& up, bool tanh, const Tensor& out) {
  check_alike(up, gate, "up", "gate");
  check_alike(out, gate, "out", "gate");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const StridedRows g(gate), u(up);
  check_scratch(kernels_of(level).geglu_forward(
      {g.data, u.data, out.mutable_data_ptr(), g.rows, g.width, g.stride, u.stride, dtype_of(gate, "gate"), tanh}));
}

Tensor geglu_forward(int64_t level, const Tensor& gate, const Tensor& up, bool tanh) {
  const Tensor out = fresh_contiguous(gate);
  geglu_forward_out(level, gate, up, tanh, out);
  return out;
}

std::tuple<Tensor, Tensor> geglu_backward(int64_t level, const Tensor& dy, const Tensor& gate, const Tensor& up,
                                          bool tanh) {
  check_alike(up, gate, "up", "gate");
  check_alike(dy, gate, "dy", "gate");
  const Tensor gradient = as_contiguous(dy), dgate = fresh_contiguous(gate), dup = fresh_contiguous(gate);
  const StridedRows g(gate), u(up);
  check_scratch(kernels_of(level).geglu_backward({gradient.const_data_ptr(), g.data, u.data, dgate.mutable_data_ptr(),
                                                  dup.mutable_data_ptr(), g.rows, g.width, g.stride, u.stride,
                                                  dtype_of(gate, "gate"), tanh}));
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("geglu_forward(int level, Tensor gate, Tensor up, bool tanh) -> Tensor");
  m.def("geglu_forward_out(int level, Tensor gate, Tensor up, bool tanh, Tensor(a!) out) -> ()");
  m.def("geglu_backward(int level, Tensor dy, Tensor gate, Tensor up, bool tanh) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("geglu_forward", TORCH_BOX(&geglu_forward));
  m.impl("geglu_forward_out", TORCH_BOX(&geglu_forward_out));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}

}  // namespace llmcore
