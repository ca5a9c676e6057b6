"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

var is the mean of the squared distances from the mean (over C, not C - 1).

Tensors:
    x       (..., C)  float32, bfloat16, float16 or float64, any strides
    weight  (C)       x's dtype or float32; None stands for ones
    bias    (C)       x's dtype or float32; None stands for zeros
    y       (..., C)  x's dtype
Float32: mean, variance (in a second pass, so that a large offset costs nothing) and the products;
rounded once, into y.
Edge cases: no rows gives no rows; a NaN or inf spreads over its row as in torch; a row of equal
values gives bias.
Errors: TypeError for a dtype, ValueError for a shape, a device or a negative eps; both name the
argument.
Source: Ba, Kiros and Hinton, Layer Normalization, 2016, section 3.

Kernels: forward(x, weight, bias, eps) -> y; into the same with `out` behind.
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
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The definition, in at least float32."""
    wide = contract.widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def check(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating({"weight": weight, "bias": bias}, x=x)
    contract.check_rows(x)
    contract.check_dtype(x, "x", or_float32=True, weight=weight, bias=bias)
    contract.check_shape(x.shape[-1:], "the last axis of x", weight=weight, bias=bias)
    contract.check_number(0, math.inf, eps=eps)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width = draw.size(1, 70), draw.size(1, 700)
    for shape in ((rows, width), (2, 3, 341), (1, 1), (9, 7), (4, 19), (0, 8), (5, 768)):
        parameters = (draw.normal(shape[-1]), draw.normal(shape[-1]))
        yield Sample("x".join(map(str, shape)), (draw.normal(*shape), *parameters, 1e-5))
    yield Sample("no_weight", (draw.normal(7, 33), None, draw.normal(33), 1e-5))
    yield Sample("no_bias", (draw.normal(7, 33), draw.normal(33), None, 1e-6))
    yield Sample("neither", (draw.normal(7, 33),))
    yield Sample("strided", (draw.normal(16, 9).T, draw.normal(16), draw.normal(16), 1e-5))
    yield Sample("large_offset", (draw.normal(4, 65) + 50, draw.normal(65), draw.normal(65), 1e-5))
    wide_parameters = (draw.normal(64), draw.normal(64))
    yield Sample("float32_weight", (draw.normal(3, 64), *wide_parameters, 1e-5), keep=(1, 2))


def refuses(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> list[str]:
    return native.refuses_tensors(x, weight, bias)


@native.fake("layer_norm_forward")
def _(
    level: int,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("layer_norm")


@native.fake("layer_norm_backward")
def _(
    level: int,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(x.shape[-1] if need_dweight else 0, dtype=torch.float32)
    return dx, dweight, x.new_empty(x.shape[-1] if need_dbias else 0, dtype=torch.float32)


def refuses_cuda(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> list[str]:
    return contract.refuses_cuda_rows(x, weight, bias)


OP = Op(
    "layer_norm",
    reference,
    check,
    samples,
    (
        cuda_candidate("layer_norm", refuses_cuda),
        triton_candidate("layer_norm", contract.refuses_wide_rows),
        *native_candidates("layer_norm", refuses),
    ),
)


class LayerNorm(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        kernel: Candidate,
    ) -> torch.Tensor:
        return kernel.forward(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, ctx.eps, ctx.kernel = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias = tensors = ctx.saved_tensors
        if contract.differentiated_again():
            again = contract.gradients(lambda x, w, b: reference(x, w, b, ctx.eps), tensors, dy)
            return *again, None, None
        needs = ctx.needs_input_grad[:3]
        dx, dweight, dbias = ctx.kernel.backward(dy, x, weight, ctx.eps, *needs)
        return (
            dx if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            None,
            None,
        )


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis, in float32.

    x (..., C); weight and bias (C), x's dtype or float32, or None. The result has x's shape and
    dtype. `out`, contiguous, takes it instead of a fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.row_key(x, weight, bias, eps=eps), x, weight, bias, eps)
    if out is not None:
        contract.check_out(out, x.shape, x, x, weight, bias)
        return contract.into(out, kernel, x, weight, bias, eps)
    if kernel.backward is not None and contract.wants_gradient(x, weight, bias):
        return LayerNorm.record(x, weight, bias, eps, kernel)
    return kernel.forward(x, weight, bias, eps)
