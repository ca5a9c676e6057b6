"""softmax: y = exp(x - max(x)) / sum(exp(x - max(x))), over one axis.

Tensors:
    x  any shape with at least one axis; float32, bfloat16, float16 or float64, any strides
    y  x's shape and dtype
Float32: the exponentials and their sum; rounded once, into y.
Edge cases: an empty axis or no rows gives an empty result; a row that holds NaN or inf, or is -inf
all over, is NaN as in torch (masked_softmax gives zeros for the last).
Errors: TypeError for a dtype, ValueError for a scalar or an axis that x does not have.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, section 2.

Kernels: forward(x, dim) -> y with 0 <= dim < x.ndim; into the same with `out` behind;
backward(dy, y, dim) -> dx. The native ones take the last axis: others are moved there first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample


def reference(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The definition, in at least float32; torch's softmax subtracts the maximum."""
    return contract.widen(x).softmax(dim).to(x.dtype)


def check(x: torch.Tensor, dim: int) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x)
    contract.check_rows(x)
    if not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not 0 <= dim < x.ndim:
        raise ValueError(f"dim: x has {x.ndim} axes, expected {-x.ndim} to {x.ndim - 1}")


def arguments(x: torch.Tensor, dim: int = -1) -> tuple[Any, ...]:
    """dim counted from the front."""
    if isinstance(x, torch.Tensor) and isinstance(dim, int) and dim < 0:
        dim += x.ndim
    return x, dim


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width = draw.size(1, 70), draw.size(1, 700)
    for shape in ((rows, width), (2, 3, 341), (1, 1), (0, 8), (3, 0), (5,), (3, 1025)):
        yield Sample("x".join(map(str, shape)), (draw.normal(*shape) * 3,))
    yield Sample("axis_0", (draw.normal(7, 33), 0))
    yield Sample("axis_1_of_3", (draw.normal(3, 17, 5), 1))
    yield Sample("strided", (draw.normal(16, 9).T,))
    yield Sample("large_offset", (draw.normal(4, 65) + 200,))
    some_masked = draw.normal(6, 50).masked_fill(draw.chance(0.5, 6, 50), float("-inf"))
    some_masked[:, 3] = 0.5
    yield Sample("minus_inf", (some_masked,))


@native.fake("softmax_forward")
def _(level: int, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("softmax")


@native.fake("softmax_backward")
def _(level: int, dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def last_axis(candidate: Candidate) -> Candidate:
    """A raw candidate, which knows the last axis only, as one that takes any."""
    raw_forward, raw_backward, raw_into = candidate.forward, candidate.backward, candidate.into
    assert raw_backward is not None and raw_into is not None

    def forward(x: torch.Tensor, dim: int) -> torch.Tensor:
        if dim == x.ndim - 1:
            return raw_forward(x)
        return raw_forward(x.movedim(dim, -1)).movedim(-1, dim)

    def into(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
        if dim == x.ndim - 1:
            raw_into(x, out)
        else:
            out.copy_(forward(x, dim))

    def backward(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
        if dim == y.ndim - 1:
            return raw_backward(dy, y)
        return raw_backward(dy.movedim(dim, -1), y.movedim(dim, -1)).movedim(-1, dim)

    return dataclasses.replace(candidate, forward=forward, backward=backward, into=into)


def refuses(x: torch.Tensor, dim: int) -> list[str]:
    return native.refuses_tensors(x)


def refuses_cuda(x: torch.Tensor, dim: int) -> list[str]:
    row = x.movedim(dim, -1) if x.ndim else x
    return contract.refuses_cuda_rows(row, limit=contract.CUDA_ROW)


def refuses_triton(x: torch.Tensor, dim: int) -> list[str]:
    return contract.refuses_wide_rows(x, axis=dim)


OP = Op(
    "softmax",
    reference,
    check,
    samples,
    tuple(
        map(
            last_axis,
            (
                cuda_candidate("softmax", refuses_cuda),
                triton_candidate("softmax", refuses_triton),
                *native_candidates("softmax", refuses),
            ),
        )
    ),
    arguments=arguments,
)


class Softmax(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(x: torch.Tensor, dim: int, kernel: Candidate) -> torch.Tensor:
        return kernel.forward(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.dim, ctx.kernel = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, y = ctx.saved_tensors
        if contract.differentiated_again():
            return *contract.gradients(lambda t: reference(t, ctx.dim), (x,), dy), None, None
        return ctx.kernel.backward(dy, y, ctx.dim), None, None


def softmax(x: torch.Tensor, dim: int = -1, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """exp(x - max(x)) / sum(exp(x - max(x))) over the axis `dim`, in float32.

    x of any shape. The result has x's shape and dtype. `out`, contiguous, takes it instead of a
    fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(x, dim)
    kernel = OP.kernel(contract.call_key(args[:1], args[1]), *args)
    if out is not None:
        contract.check_out(out, x.shape, x, x)
        return contract.into(out, kernel, *args)
    if kernel.backward is not None and contract.wants_gradient(x):
        return Softmax.record(*args, kernel)
    return kernel.forward(*args)
