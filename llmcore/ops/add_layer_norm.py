"""add_layer_norm: total = x + residual, y = layer_norm(total, weight, bias, eps); both are results.

Tensors:
    x         (..., C)  float32, bfloat16, float16 or float64, any strides
    residual  (..., C)  x's shape; of another dtype, both are promoted as x + residual would be
    weight    (C)       the sum's dtype or float32; None stands for ones
    bias      (C)       the sum's dtype or float32; None stands for zeros
    y         (..., C)  the sum's dtype
    total     (..., C)  the sum's dtype
Float32: the sum, rounded into total as torch rounds x + residual; then layer_norm of the rounded
total in float32, rounded once, into y. So the fused op computes what the two plain ones do.
Edge cases, source: as layer_norm.
Errors: TypeError for a dtype, ValueError for a shape or a device; both name the argument.

Kernels: forward(x, residual, weight, bias, eps) -> y, total, x and residual of one dtype; into the
same with both results behind. total may be residual's or x's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmcore.dispatch import Op
from llmcore.ops import contract
from llmcore.ops.layer_norm import reference as layer_norm_reference
from llmcore.ops.sample import Draw, Sample


def reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in at least float32."""
    total = (contract.widen(x) + contract.widen(residual)).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps), total


def check(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x, residual=residual, weight=weight, bias=bias)
    contract.check_rows(x)
    contract.check_shape(x.shape, "the shape of x", residual=residual)
    contract.check_dtype(x, "x + residual", or_float32=True, weight=weight, bias=bias)
    contract.check_shape(x.shape[-1:], "the last axis of x", weight=weight, bias=bias)


def arguments(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """x and residual in the dtype of their sum."""
    return (*contract.promote(x, residual), weight, bias, eps)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width = draw.size(1, 70), draw.size(1, 700)
    for shape in ((rows, width), (2, 3, 341), (1, 1), (0, 8)):
        pair, parameters = (draw.normal(*shape), draw.normal(*shape)), shape[-1]
        weights = (draw.normal(parameters), draw.normal(parameters))
        yield Sample("x".join(map(str, shape)), (*pair, *weights, 1e-5))
    yield Sample("neither", (draw.normal(7, 33), draw.normal(7, 33), None, None, 1e-6))
    pair = (draw.normal(16, 9).T, draw.normal(9, 16))
    yield Sample("strided", (*pair, draw.normal(16), draw.normal(16), 1e-5))
    pair = (draw.normal(3, 40), draw.normal(3, 40))
    wide = (draw.normal(40), draw.normal(40))
    yield Sample("float32_residual", (*pair, *wide, 1e-5), keep=(1, 2, 3))


OP = Op(
    "add_layer_norm",
    reference,
    check,
    samples,
    arguments=arguments,
    cpu="no CPU kernel yet: the definition runs",
    triton="no Triton kernel yet",
    cuda="no CUDA kernel yet",
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual).

    x and residual (..., C), promoted to one dtype as x + residual would be; weight and bias (C),
    that dtype or float32, or None. `out`, two contiguous tensors, takes the results instead of
    fresh tensors (the second may be residual itself); no gradient goes through them.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(x, residual, weight, bias, eps)
    kernel = OP.kernel(contract.call_key(args[:4]), *args)
    if out is not None:
        contract.check_out_pair(out, args[0].shape, args[0], x, residual, weight, bias)
        return contract.into_pair(out, kernel, *args)
    return kernel.forward(*args)
