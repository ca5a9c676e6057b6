#include "../register.h"

namespace llmcore {
namespace {

void swiglu_forward_out(int64_t level, const Tensor& gate, const Tensor& up, const Tensor& out) {
  check_alike(up, gate, "up", "gate");
  check_alike(out, gate, "out", "gate");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const StridedRows g(gate), u(up);
  check_scratch(kernels_of(level, gate)
                    .swiglu_forward({g.data, u.data, out.mutable_data_ptr(), g.rows, g.width, g.stride, u.stride,
                                     dtype_of(gate, "gate"), false}));
}

Tensor swiglu_forward(int64_t level, const Tensor& gate, const Tensor& up) {
  const Tensor out = fresh_contiguous(gate);
  swiglu_forward_out(level, gate, up, out);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(int64_t level, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_alike(up, gate, "up", "gate");
  check_alike(dy, gate, "dy", "gate");
  const Tensor gradient = as_contiguous(dy), dgate = fresh_contiguous(gate), dup = fresh_contiguous(gate);
  const StridedRows g(gate), u(up);
  check_scratch(
      kernels_of(level, gate)
          .swiglu_backward({gradient.const_data_ptr(), g.data, u.data, dgate.mutable_data_ptr(), dup.mutable_data_ptr(),
                            g.rows, g.width, g.stride, u.stride, dtype_of(gate, "gate"), false}));
  return {dgate, dup};
}

template <typename Library>
void implement(Library& m) {
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_forward_out", TORCH_BOX(&swiglu_forward_out));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("swiglu_forward(int level, Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_forward_out(int level, Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(int level, Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
