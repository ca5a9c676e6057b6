"""geglu: y = gelu(gate) * up, gelu exact or by tanh.

Tensors:
    gate, up  one shape, any; one dtype: float32, bfloat16, float16 or float64; any strides, so that
              both may be halves of one tensor
    y         their shape and dtype
Float32: everything; rounded once, into y.
Edge cases: empty gives empty; NaN and inf as in gelu and the product.
Errors: TypeError for a dtype, ValueError for a shape, a device or another `approximate`.
Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 6 (the part before W2).

Kernels: forward(gate, up, approximate) -> y; into the same with `out` behind, which may be gate or
up; backward(dy, gate, up, approximate) -> dgate, dup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.gelu import APPROXIMATIONS, by_name
from llmcore.ops.gelu import reference as gelu_reference
from llmcore.ops.sample import Draw, Sample


def reference(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """The definition, in at least float32."""
    y = gelu_reference(contract.widen(gate), approximate) * contract.widen(up)
    return y.to(gate.dtype)


def check(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(gate=gate, up=up)
    contract.check_dtype(gate, "gate", up=up)
    contract.check_shape(gate.shape, "the shape of gate", up=up)
    contract.check_choice("approximate", approximate, APPROXIMATIONS)


def samples(draw: Draw) -> Iterator[Sample]:
    for approximate in APPROXIMATIONS:
        for shape in ((draw.size(1, 70), draw.size(1, 700)), (2, 3, 341), (0, 8)):
            name = "x".join(map(str, (approximate, *shape)))
            yield Sample(name, (draw.normal(*shape) * 2, draw.normal(*shape), approximate))
        halves = draw.normal(5, 66).chunk(2, -1)
        yield Sample(f"{approximate}_halves_of_one", (*halves, approximate))
        strided = (draw.normal(16, 9).T, draw.normal(9, 16))
        yield Sample(f"{approximate}_strided", (*strided, approximate))


@native.fake("geglu_forward")
def _(level: int, gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> torch.Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


native.fake_into("geglu")


@native.fake("geglu_backward")
def _(
    level: int, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return fresh, torch.empty_like(fresh)


def refuses(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> list[str]:
    return native.refuses_tensors(gate, up)


OP = Op(
    "geglu",
    reference,
    check,
    samples,
    (triton_candidate("geglu"), *map(by_name, native_candidates("geglu", refuses))),
    cuda="no CUDA kernel: one elementwise pass is Triton's to fuse",
)


class GeGLU(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        gate: torch.Tensor, up: torch.Tensor, approximate: str, kernel: Candidate
    ) -> torch.Tensor:
        return kernel.forward(gate, up, approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gate, up, ctx.approximate, ctx.kernel = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        gate, up = tensors = ctx.saved_tensors
        if contract.differentiated_again():
            again = contract.gradients(lambda g, u: reference(g, u, ctx.approximate), tensors, dy)
            return *again, None, None
        return *ctx.kernel.backward(dy, gate, up, ctx.approximate), None, None


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    approximate: str = "none",
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gelu(gate) * up, in float32; gelu exactly (approximate="none") or by tanh.

    gate and up of one shape and dtype; the result has both. `out`, contiguous, takes it instead of
    a fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.call_key((gate, up), approximate), gate, up, approximate)
    if out is not None:
        contract.check_out(out, gate.shape, gate, gate, up)
        return contract.into(out, kernel, gate, up, approximate)
    if kernel.backward is not None and contract.wants_gradient(gate, up):
        return GeGLU.record(gate, up, approximate, kernel)
    return kernel.forward(gate, up, approximate)
