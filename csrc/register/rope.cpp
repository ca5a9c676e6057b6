#include "../register.h"

namespace llmcore {
namespace {

// x or dy turned into `out`, `back` by the opposite angle.
void turn(int64_t level, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool back,
          const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected shape (B, H, T, D)");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  check_alike(out, x, "out", "x");
  check_alike(sin, cos, "sin", "cos");
  const int64_t axes = cos.dim(), B = x.size(0), T = x.size(2), D = x.size(3);
  STD_TORCH_CHECK((axes == 2 || (axes == 3 && cos.size(0) == B)) && cos.size(axes - 2) == T,
                  "cos: expected shape (T, R/2) or (B, T, R/2)");
  const int64_t half = cos.size(axes - 1);
  STD_TORCH_CHECK(2 * half <= D, "cos: expected R <= D");
  const Tensor rows = D <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
  const Tensor c = as_contiguous(cos), s = as_contiguous(sin);

  Rope rope{};
  rope.x = rows.const_data_ptr(), rope.cos = c.const_data_ptr(), rope.sin = s.const_data_ptr();
  rope.y = out.mutable_data_ptr();
  rope.B = B, rope.H = x.size(1), rope.T = T, rope.D = D, rope.half = half;
  for (int64_t i = 0; i < 3; ++i) rope.x_strides[i] = rows.stride(i);
  rope.angle_batch_stride = axes == 3 ? T * half : 0;
  rope.dtype = dtype_of(x, "x"), rope.angle_dtype = dtype_of(c, "cos");
  STD_TORCH_CHECK(rope.angle_dtype == rope.dtype || rope.angle_dtype == Dtype::float32,
                  "cos: expected x's dtype or float32");
  rope.interleaved = interleaved, rope.back = back;
  check_scratch(kernels_of(level, x).rope(rope));
}

void rope_forward_out(int64_t level, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                      const Tensor& out) {
  turn(level, x, cos, sin, interleaved, false, out);
}

Tensor rope_forward(int64_t level, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const Tensor out = fresh_contiguous(x);
  turn(level, x, cos, sin, interleaved, false, out);
  return out;
}

Tensor rope_backward(int64_t level, const Tensor& dy, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const Tensor dx = fresh_contiguous(dy);
  turn(level, dy, cos, sin, interleaved, true, dx);
  return dx;
}

template <typename Library>
void implement(Library& m) {
  m.impl("rope_forward", TORCH_BOX(&rope_forward));
  m.impl("rope_forward_out", TORCH_BOX(&rope_forward_out));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmcore, m) {
  m.def("rope_forward(int level, Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
  m.def("rope_forward_out(int level, Tensor x, Tensor cos, Tensor sin, bool interleaved, Tensor(a!) out) -> ()");
  m.def("rope_backward(int level, Tensor dy, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { implement(m); }
LLMCORE_CUDA_IMPL(implement)

}  // namespace llmcore
