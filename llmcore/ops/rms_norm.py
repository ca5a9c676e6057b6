"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

Tensors:
    x       (..., C)  float32, bfloat16, float16 or float64, any strides
    weight  (C)       x's dtype or float32; None stands for ones
    y       (..., C)  x's dtype
Float32: the mean, the root and the products; rounded once, into y. dweight is summed over rows in
float32.
Edge cases: no rows gives no rows; a NaN or inf spreads over its row as in torch; a row of zeros
gives zeros.
Errors: TypeError for a dtype, ValueError for a shape, a device or a negative eps; both name the
argument.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.

Kernels: forward(x, weight, eps) -> y; into the same with `out` behind;
backward(dy, x, weight, eps, need_dx, need_dweight) -> dx, dweight (C, float32); what is not needed
is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample


def reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """The definition, in at least float32."""
    wide = contract.widen(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


def check(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating({"weight": weight}, x=x)
    contract.check_rows(x)
    contract.check_dtype(x, "x", or_float32=True, weight=weight)
    contract.check_shape(x.shape[-1:], "the last axis of x", weight=weight)
    contract.check_number(0, math.inf, eps=eps)


def refuses(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> list[str]:
    return native.refuses_tensors(x, weight)


@native.fake("rms_norm_forward")
def _(level: int, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("rms_norm")


@native.fake("rms_norm_backward")
def _(
    level: int,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return dx, x.new_empty(x.shape[-1] if need_dweight else 0, dtype=torch.float32)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width = draw.size(1, 70), draw.size(1, 700)
    for shape in ((rows, width), (2, 3, 341), (1, 1), (9, 7), (4, 19), (0, 8), (5, 768)):
        yield Sample("x".join(map(str, shape)), (draw.normal(*shape), draw.normal(shape[-1]), 1e-6))
    yield Sample("no_weight", (draw.normal(7, 33), None, 1e-5))
    yield Sample("strided", (draw.normal(16, 9).T, draw.normal(16), 1e-6))
    yield Sample("tiny_values", (draw.normal(4, 65) * 1e-4, draw.normal(65), 1e-6))


def refuses_cuda(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> list[str]:
    return contract.refuses_cuda_rows(x, weight)


OP = Op(
    "rms_norm",
    reference,
    check,
    samples,
    (
        cuda_candidate("rms_norm", refuses_cuda),
        triton_candidate("rms_norm", contract.refuses_wide_rows),
        *native_candidates("rms_norm", refuses),
    ),
)


class RMSNorm(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor | None, eps: float, kernel: Candidate
    ) -> torch.Tensor:
        return kernel.forward(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, ctx.eps, ctx.kernel = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if contract.differentiated_again():
            return (
                *contract.gradients(lambda x, w: reference(x, w, ctx.eps), (x, weight), dy),
                None,
                None,
            )
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dx, dweight = ctx.kernel.backward(dy, x, weight, ctx.eps, need_dx, need_dweight)
        return (
            dx if need_dx else None,
            dweight.to(weight.dtype) if need_dweight else None,
            None,
            None,
        )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    x (..., C); weight (C), x's dtype or float32, or None. The result has x's shape and dtype.
    `out`, contiguous, takes it instead of a fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.row_key(x, weight, eps=eps), x, weight, eps)
    if out is not None:
        contract.check_out(out, x.shape, x, x, weight)
        return contract.into(out, kernel, x, weight, eps)
    if kernel.backward is not None and contract.wants_gradient(x, weight):
        return RMSNorm.record(x, weight, eps, kernel)
    return kernel.forward(x, weight, eps)
