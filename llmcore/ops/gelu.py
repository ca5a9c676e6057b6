"""gelu: y = x * Phi(x), Phi the normal distribution function; or its tanh approximation.

    none  y = x / 2 * (1 + erf(x / sqrt(2)))
    tanh  y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

Tensors:
    x  any shape; float32, bfloat16, float16 or float64, any strides
    y  x's shape and dtype
Float32: everything; rounded once, into y.
Edge cases: an empty x gives an empty y; NaN gives NaN. At +inf and -inf a result is inf, 0 or NaN,
as torch's is, which differs between its builds.
Errors: TypeError for a dtype, ValueError for another `approximate`.
Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2.

Kernels: forward(x, approximate) -> y; into the same with `out` behind, which may be x;
backward(dy, x, approximate) -> dx.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample

APPROXIMATIONS = ("none", "tanh")


def reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """The definition, in at least float32."""
    return F.gelu(contract.widen(x), approximate=approximate).to(x.dtype)


def check(x: torch.Tensor, approximate: str = "none") -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x)
    contract.check_choice("approximate", approximate, APPROXIMATIONS)


def samples(draw: Draw) -> Iterator[Sample]:
    for approximate in APPROXIMATIONS:
        for shape in ((draw.size(1, 70), draw.size(1, 700)), (2, 3, 341), (1,), (0, 8)):
            name = "x".join(map(str, (approximate, *shape)))
            yield Sample(name, (draw.normal(*shape) * 2, approximate))
        yield Sample(f"{approximate}_strided", (draw.normal(16, 9).T, approximate))
        yield Sample(f"{approximate}_far", (draw.normal(100) * 20, approximate))


@native.fake("gelu_forward")
def _(level: int, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("gelu")


@native.fake("gelu_backward")
def _(level: int, dy: torch.Tensor, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def by_name(candidate: Candidate) -> Candidate:
    """A raw candidate, which is told whether to go by tanh, as one that takes `approximate`."""
    raw_forward, raw_backward, raw_into = candidate.forward, candidate.backward, candidate.into
    assert raw_backward is not None and raw_into is not None

    def forward(*args: Any) -> Any:
        *tensors, approximate = args
        return raw_forward(*tensors, approximate == "tanh")

    def into(*args: Any) -> None:
        *tensors, approximate, out = args
        raw_into(*tensors, approximate == "tanh", out)

    def backward(*args: Any) -> Any:
        *tensors, approximate = args
        return raw_backward(*tensors, approximate == "tanh")

    return dataclasses.replace(candidate, forward=forward, backward=backward, into=into)


def refuses(x: torch.Tensor, approximate: str) -> list[str]:
    return native.refuses_tensors(x)


OP = Op(
    "gelu",
    reference,
    check,
    samples,
    (triton_candidate("gelu"), *map(by_name, native_candidates("gelu", refuses))),
    cuda="no CUDA kernel: one elementwise pass is Triton's to fuse",
)


class Gelu(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(x: torch.Tensor, approximate: str, kernel: Candidate) -> torch.Tensor:
        return kernel.forward(x, approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.approximate, ctx.kernel = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (x,) = tensors = ctx.saved_tensors
        if contract.differentiated_again():
            again = contract.gradients(lambda t: reference(t, ctx.approximate), tensors, dy)
            return *again, None, None
        return ctx.kernel.backward(dy, x, ctx.approximate), None, None


def gelu(
    x: torch.Tensor, approximate: str = "none", *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x * Phi(x), exactly (approximate="none") or by tanh, in float32.

    x of any shape. The result has x's shape and dtype. `out`, contiguous, takes it instead of a
    fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.call_key((x,), approximate), x, approximate)
    if out is not None:
        contract.check_out(out, x.shape, x, x)
        return contract.into(out, kernel, x, approximate)
    if kernel.backward is not None and contract.wants_gradient(x):
        return Gelu.record(x, approximate, kernel)
    return kernel.forward(x, approximate)
