"""add_rms_norm: total = x + residual, y = rms_norm(total, weight, eps); both are results.

Tensors:
    x         (..., C)  float32, bfloat16, float16 or float64, any strides
    residual  (..., C)  x's shape; of another dtype, both are promoted as x + residual would be
    weight    (C)       the sum's dtype or float32; None stands for ones
    y         (..., C)  the sum's dtype
    total     (..., C)  the sum's dtype
Float32: the sum, rounded into total as torch rounds x + residual; then rms_norm of the rounded
total in float32, rounded once, into y. So the fused op computes what the two plain ones do.
Edge cases, source: as rms_norm.
Errors: TypeError for a dtype, ValueError for a shape or a device; both name the argument.

Kernels: forward(x, residual, weight, eps) -> y, total, x and residual of one dtype; into the same
with both results behind. total may be residual's or x's own memory;
backward(dy, dtotal or None, total, weight, eps, need_dx, need_dweight) -> dx, which is residual's
gradient too, dweight (C, float32); what is not needed is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.rms_norm import reference as rms_norm_reference
from llmcore.ops.sample import Draw, Sample


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in at least float32."""
    total = (contract.widen(x) + contract.widen(residual)).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating({"weight": weight}, x=x, residual=residual)
    contract.check_rows(x)
    contract.check_shape(x.shape, "the shape of x", residual=residual)
    contract.check_dtype(x, "x + residual", or_float32=True, weight=weight)
    contract.check_shape(x.shape[-1:], "the last axis of x", weight=weight)
    contract.check_number(0, math.inf, eps=eps)


def arguments(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[Any, ...]:
    """x and residual in the dtype of their sum."""
    return (*contract.promote(x, residual), weight, eps)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width = draw.size(1, 70), draw.size(1, 700)
    for shape in ((rows, width), (2, 3, 341), (1, 1), (0, 8)):
        args = (draw.normal(*shape), draw.normal(*shape), draw.normal(shape[-1]), 1e-6)
        yield Sample("x".join(map(str, shape)), args)
    yield Sample("no_weight", (draw.normal(7, 33), draw.normal(7, 33), None, 1e-5))
    yield Sample("strided", (draw.normal(16, 9).T, draw.normal(9, 16), draw.normal(16), 1e-6))
    args = (draw.normal(3, 40), draw.normal(3, 40), draw.normal(40), 1e-6)
    yield Sample("float32_residual", args, keep=(1, 2))


def refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> list[str]:
    return native.refuses_tensors(x, residual, weight)


@native.fake("add_rms_norm_forward")
def _(
    level: int,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(total), total


native.fake_into("add_rms_norm")


@native.fake("add_rms_norm_backward")
def _(
    level: int,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dx = dx if need_dx else total.new_empty(0)
    dweight = total.new_empty(total.shape[-1] if need_dweight else 0, dtype=torch.float32)
    return dx, dweight


def refuses_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> list[str]:
    return contract.refuses_cuda_rows(x, residual, weight)


OP = Op(
    "add_rms_norm",
    reference,
    check,
    samples,
    (
        cuda_candidate("add_rms_norm", refuses_cuda),
        triton_candidate("add_rms_norm", contract.refuses_wide_rows),
        *native_candidates("add_rms_norm", refuses),
    ),
    arguments=arguments,
)


class AddRMSNorm(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        kernel: Candidate,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.forward(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, weight, ctx.eps, ctx.kernel = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None) -> tuple[Any, ...]:
        total, weight = tensors = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy
        if contract.differentiated_again():
            # The gradient of x and of residual alike. Views, since total itself depends on weight.
            views = [t if t is None else t.view_as(t) for t in tensors]
            dx, *rest = contract.gradients(
                lambda t, w: rms_norm_reference(t, w, ctx.eps), views, dy
            )
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
            return dx, dx, *rest, None, None
        need_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        need_dweight = ctx.needs_input_grad[2]
        dx, dweight = ctx.kernel.backward(dy, dtotal, total, weight, ctx.eps, need_dx, need_dweight)
        return (
            dx if ctx.needs_input_grad[0] else None,
            dx if ctx.needs_input_grad[1] else None,
            dweight.to(weight.dtype) if need_dweight else None,
            None,
            None,
        )


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual).

    x and residual (..., C), promoted to one dtype as x + residual would be; weight (C), that dtype
    or float32, or None. `out`, two contiguous tensors, takes the results instead of fresh tensors
    (the second may be residual itself); no gradient goes through them.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(x, residual, weight, eps)
    kernel = OP.kernel(contract.call_key(args[:3], eps), *args)
    if out is not None:
        contract.check_out_pair(out, args[0].shape, args[0], x, residual, weight)
        return contract.into_pair(out, kernel, *args)
    if kernel.backward is not None and contract.wants_gradient(*args[:3]):
        return AddRMSNorm.record(*args, kernel)
    return kernel.forward(*args)
