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
with both results behind. total may be residual's or x's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmcore.dispatch import Op
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
    contract.check_floating(x=x, residual=residual, weight=weight)
    contract.check_rows(x)
    contract.check_shape(x.shape, "the shape of x", residual=residual)
    contract.check_dtype(x, "x + residual", or_float32=True, weight=weight)
    contract.check_shape(x.shape[-1:], "the last axis of x", weight=weight)


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


OP = Op(
    "add_rms_norm",
    reference,
    check,
    samples,
    arguments=arguments,
    cpu="no CPU kernel yet: the definition runs",
    triton="no Triton kernel yet",
    cuda="no CUDA kernel yet",
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
    kernel = OP.kernel(contract.call_key(args[:3]), *args)
    if out is not None:
        contract.check_out_pair(out, args[0].shape, args[0], x, residual, weight)
        return contract.into_pair(out, kernel, *args)
    return kernel.forward(*args)
