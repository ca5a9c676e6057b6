"""swiglu: y = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

Tensors:
    gate, up  one shape, any; one dtype: float32, bfloat16, float16 or float64; any strides, so that
              both may be halves of one tensor
    y         their shape and dtype
Float32: everything; rounded once, into y.
Edge cases: empty gives empty; NaN and inf as in torch's silu and product.
Errors: TypeError for a dtype, ValueError for a shape or a device; both name the argument.
Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 6 (the part before W2).

Kernels: forward(gate, up) -> y; into the same with `out` behind, which may be gate or up;
backward(dy, gate, up) -> dgate, dup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition, in at least float32."""
    return (F.silu(contract.widen(gate)) * contract.widen(up)).to(gate.dtype)


def check(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(gate=gate, up=up)
    contract.check_dtype(gate, "gate", up=up)
    contract.check_shape(gate.shape, "the shape of gate", up=up)


def samples(draw: Draw) -> Iterator[Sample]:
    for shape in ((draw.size(1, 70), draw.size(1, 700)), (2, 3, 341), (1,), (0, 8)):
        yield Sample("x".join(map(str, shape)), (draw.normal(*shape) * 2, draw.normal(*shape)))
    yield Sample("halves_of_one", tuple(draw.normal(5, 66).chunk(2, -1)))
    yield Sample("strided", (draw.normal(16, 9).T, draw.normal(9, 16)))
    yield Sample("far", (draw.normal(100) * 30, draw.normal(100)))


@native.fake("swiglu_forward")
def _(level: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


native.fake_into("swiglu")


@native.fake("swiglu_backward")
def _(
    level: int, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return fresh, torch.empty_like(fresh)


def refuses(gate: torch.Tensor, up: torch.Tensor) -> list[str]:
    return native.refuses_tensors(gate, up)


def refuses_cuda(gate: torch.Tensor, up: torch.Tensor) -> list[str]:
    return native.refuses_kinds(gate, up)


OP = Op(
    "swiglu",
    reference,
    check,
    samples,
    (
        cuda_candidate("swiglu", refuses_cuda),
        triton_candidate("swiglu"),
        *native_candidates("swiglu", refuses),
    ),
)


class SwiGLU(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor, kernel: Candidate) -> torch.Tensor:
        return kernel.forward(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gate, up, ctx.kernel = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        gate, up = tensors = ctx.saved_tensors
        if contract.differentiated_again():
            return *contract.gradients(reference, tensors, dy), None
        return *ctx.kernel.backward(dy, gate, up), None


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(gate) * up, in float32.

    gate and up of one shape and dtype; the result has both. `out`, contiguous, takes it instead of
    a fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.call_key((gate, up)), gate, up)
    if out is not None:
        contract.check_out(out, gate.shape, gate, gate, up)
        return contract.into(out, kernel, gate, up)
    if kernel.backward is not None and contract.wants_gradient(gate, up):
        return SwiGLU.record(gate, up, kernel)
    return kernel.forward(gate, up)
