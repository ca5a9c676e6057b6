"""linear_cross_entropy: cross_entropy(x @ weight.T + bias, target), the logits never whole.

Tensors:
    x       (..., C)  hidden states; float32, bfloat16, float16 or float64, any strides
    weight  (V, C)    x's dtype
    bias    (V)       x's dtype or float32; None stands for zeros
    target  (...)     int64, 0 to V - 1 or ignore_index
    loss    () for mean and sum, (...) for none; x's dtype
Float32: logits (which no dtype narrower than float32 ever holds), their softmax and the sums;
rounded once, into the loss. Each gradient is accumulated in float32 and rounded once.
A kernel holds some rows of logits at a time; the definition, which is for reading, holds all.
In torch.autocast x, weight and bias are cast to its dtype, as torch's linear does.
Edge cases, formula, source: as cross_entropy; C may be 0.
Errors: TypeError for a dtype, ValueError for a shape, a device or an option, IndexError for a
target that is no class (on the CPU).

Kernels: forward(x, weight, target, bias, options: LossOptions) -> loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llmcore.dispatch import Op
from llmcore.ops import contract
from llmcore.ops.cross_entropy import (
    REDUCTIONS,
    LossOptions,
    check_classes,
    check_options,
    check_target,
    loss_of,
)
from llmcore.ops.sample import Draw, Sample


@contract.without_autocast
def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    options: LossOptions,
) -> torch.Tensor:
    """The definition, in at least float32."""
    wide = contract.widen(x)
    logits = F.linear(wide, weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype))
    return loss_of(logits, target, options).to(x.dtype)


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    options: LossOptions,
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x, weight=weight, bias=bias)
    contract.check_rows(x)
    contract.check_dtype(x, "x", weight=weight)
    contract.check_dtype(x, "x", or_float32=True, bias=bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (V, {x.shape[-1]}) with V >= 1, "
            "as the last axis of x"
        )
    contract.check_shape(weight.shape[:1], "the first axis of weight", bias=bias)
    check_target(target, x, "x")
    check_options(options)


def arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    """The tensors as autocast wants them, the options in one tuple."""
    x, weight, bias = contract.autocast(x, weight, bias)
    return x, weight, target, bias, LossOptions(ignore_index, label_smoothing, reduction)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width, classes = draw.size(2, 30), draw.size(1, 90), draw.size(2, 400)
    x, weight = draw.normal(rows, width), draw.normal(classes, width)
    target = draw.integers(0, classes, rows)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        yield Sample(reduction, (x, weight, target), options)
        some = target.masked_fill(draw.chance(0.4, rows), -100)
        some[0] = target[0]
        smooth = {**options, "label_smoothing": 0.2}
        yield Sample(f"{reduction}_bias", (x, weight, some, draw.normal(classes)), smooth)
    long = (draw.normal(2, 3, 16), draw.normal(1031, 16), draw.integers(0, 1031, 2, 3))
    yield Sample("2x3x1031", long, {"reduction": "none"})
    strided = (draw.normal(8, 5).T, draw.normal(8, 50).T, draw.integers(0, 50, 5))
    yield Sample("strided", strided)
    empty = (draw.normal(0, 8), draw.normal(9, 8), draw.integers(0, 9, 0))
    yield Sample("no_rows", empty, {"reduction": "sum"})
    args = (draw.normal(3, 8), draw.normal(9, 8), draw.integers(0, 9, 3), draw.normal(9))
    yield Sample("float32_bias", args, keep=(3,))


OP = Op(
    "linear_cross_entropy",
    reference,
    check,
    samples,
    arguments=arguments,
    cpu="no CPU kernel yet: the definition runs, and holds all logits",
    triton="no Triton kernel yet",
    cuda="no CUDA kernel: the two products are the GPU library's, the rest is Triton's",
)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """cross_entropy(x @ weight.T + bias, target), logits in float32 and never whole in a kernel.

    x (..., C); weight (V, C), x's dtype; bias (V), x's dtype or float32, or None; target (...)
    int64, 0 to V - 1 or ignore_index. The result has x's dtype; options as cross_entropy.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
        IndexError: a target is no class (where finding out needs no wait for an accelerator).
    """
    args = arguments(
        x,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    kernel = OP.kernel(contract.call_key(args[:4], args[4]), *args)
    check_classes(target, weight.shape[0], ignore_index)
    return kernel.forward(*args)
