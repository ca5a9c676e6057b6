"""linear_cross_entropy: cross_entropy(x @ weight.T + bias, target), the logits never whole.

Tensors:
    x       (..., C)  hidden states; float32, bfloat16, float16 or float64, any strides
    weight  (V, C)    x's dtype
    bias    (V)       x's dtype or float32; None stands for zeros
    target  (...)     int64, 0 to V - 1 or ignore_index
    loss    () for mean and sum, (...) for none; x's dtype
Float32: logits (which no dtype narrower than float32 ever holds), their softmax and the sums;
rounded once, into the loss. Each gradient is accumulated in float32 and rounded once.
A kernel holds a part of the logits at a time; the definition, which is for reading, holds all.
In torch.autocast x, weight and bias are cast to its dtype, as torch's linear does.
Edge cases, formula, source: as cross_entropy; C may be 0. NaN or inf in a row of x that is ignored
does not reach the loss, but the weight's gradient, which is a product with all of x.
Errors: TypeError for a dtype, ValueError for a shape, a device or an option, IndexError for a
target that is no class (on the CPU).

Kernels: forward(x, weight, target, bias, options: LossOptions, needs=None) -> loss, and where
`needs` (whether x, weight and bias need a gradient) is given, statistics for the backward pass
behind it and, from a kernel that makes gradients along with a loss, dx, dweight and dbias of a
gradient of 1, all empty where that does not pay; backward(dloss, x, weight, target, bias,
statistics, options, needs) -> dx, dweight, dbias (float32), each empty where not needed.
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
from llmcore.ops.cross_entropy import (
    REDUCTIONS,
    LossOptions,
    check_classes,
    check_options,
    check_target,
    loss_of,
    raw_options,
)
from llmcore.ops.sample import Draw, Sample

Needs = tuple[bool, bool, bool]
"""Of x, weight and bias."""


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
    contract.check_floating({"bias": bias}, x=x, weight=weight)
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


@native.fake("linear_cross_entropy_forward")
def _(
    level: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[torch.Tensor, ...]:
    loss = x.new_empty(target.shape if REDUCTIONS[reduction] == "none" else ())
    statistics = x.new_empty(target.numel(), 2, dtype=torch.float32)
    return loss, statistics, *empty_gradients(x, weight, want_dx, want_dweight, want_dbias)


def empty_gradients(
    x: torch.Tensor, weight: torch.Tensor, dx: bool, dweight: bool, dbias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if dx else (0,)),
        weight.new_empty(weight.shape if dweight else (0,)),
        x.new_empty(weight.shape[0] if dbias else 0, dtype=torch.float32),
    )


@native.fake("linear_cross_entropy_backward")
def _(
    level: int,
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(x, weight, need_dx, need_dweight, need_dbias)


ROWS_FOR_GRADIENTS = 27 * 64
"""From so many rows on, the CPU's forward pass makes the gradients as well.

It saves a product, the logits again, but passes the weight and its gradient through memory for
every 1/27 of the rows, which must be worth that.
"""


def come_with_loss(x: torch.Tensor, target: torch.Tensor, options: LossOptions) -> bool:
    """Whether the native forward pass makes the gradients, too.

    In float32, in which gradients are accumulated, and of one number: of a loss for each row, what
    comes back is not known yet. Function transforms differentiate the definition.
    """
    return (
        x.dtype == torch.float32
        and options.reduction != "none"
        and target.numel() >= ROWS_FOR_GRADIENTS
        and not torch._C._are_functorch_transforms_active()
    )


def with_options(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_backward = candidate.forward, candidate.backward
    assert raw_backward is not None

    def forward(*args: Any, needs: Needs | None = None) -> Any:
        *tensors, options = args
        wanted: Needs = False, False, False
        if needs is not None and come_with_loss(tensors[0], tensors[2], options):
            wanted = needs
        results = raw_forward(*tensors, *raw_options(options), *wanted)
        return results[0] if needs is None else results

    def backward(*args: Any) -> Any:
        *tensors, options, needs = args
        return raw_backward(*tensors, *raw_options(options), *needs)

    return dataclasses.replace(candidate, forward=forward, backward=backward)


def refuses(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *rest: Any) -> list[str]:
    return native.refuses_tensors(x, weight, rest[0])


OP = Op(
    "linear_cross_entropy",
    reference,
    check,
    samples,
    (
        triton_candidate("linear_cross_entropy", into=False),
        *map(with_options, native_candidates("linear_cross_entropy", refuses, into=False)),
    ),
    arguments=arguments,
    cuda="no CUDA kernel: the two products are the GPU library's, the rest is Triton's",
)


class LinearCrossEntropy(contract.KernelFunction):
    """The gradient of a kernel's forward pass: what that made itself, or by its backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None,
        options: LossOptions,
        kernel: Candidate,
        needs: Needs,
    ) -> tuple[torch.Tensor, ...]:
        return kernel.forward(x, weight, target, bias, options, needs=needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, target, bias, ctx.options, ctx.kernel, ctx.needs = inputs
        ctx.save_for_backward(x, weight, target, bias, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.early = any(t.numel() for t in output[2:])

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor | None, *rest: None) -> tuple[Any, ...]:
        x, weight, target, bias, statistics, *early = ctx.saved_tensors
        if dloss is None:
            return (None,) * 7
        if contract.differentiated_again():

            def define(*tensors: Any) -> torch.Tensor:
                return reference(tensors[0], tensors[1], target, tensors[2], ctx.options)

            dx, dweight, dbias = contract.gradients(define, (x, weight, bias), dloss)
            return dx, dweight, None, dbias, None, None, None
        if ctx.early:
            factor = number(dloss)
            dx, dweight, dbias = (times(t, dloss, factor) for t in early)
            # Those that are given away themselves are no more here in a second pass.
            ctx.early = factor is None
        else:
            dx, dweight, dbias = ctx.kernel.backward(
                dloss, x, weight, target, bias, statistics, ctx.options, ctx.needs
            )
        needs = ctx.needs
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            None,
            dbias.to(bias.dtype) if needs[2] else None,
            None,
            None,
            None,
        )


def number(dloss: torch.Tensor) -> float | None:
    """The value of a scalar; None where it has none to tell: traced, fake or a batch of them."""
    if torch.compiler.is_compiling():
        return None
    try:
        return float(dloss)
    except RuntimeError:
        return None


def times(gradient: torch.Tensor, dloss: torch.Tensor, factor: float | None) -> torch.Tensor:
    """gradient * dloss, in its own place where dloss is a number, `factor`."""
    if factor is None:
        return gradient * dloss
    # By .data, whose changes, and the receiver's, are none of those that autograd looks for in what
    # it saved: the next pass through this graph does not read this.
    return gradient.data if factor == 1.0 else gradient.data.mul_(factor)


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
    Where a gradient is wanted of a float32 loss of many rows (ROWS_FOR_GRADIENTS, sum or mean), the
    CPU's kernel makes it along with the loss, which takes a product less than doing so later, and
    two more than a loss alone: evaluate in torch.no_grad(), as ever.

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
    try:
        if kernel.backward is not None and contract.wants_gradient(x, weight, bias):
            needs = tuple(t is not None and t.requires_grad for t in (args[0], args[1], args[3]))
            loss, *_ = LinearCrossEntropy.record(*args, kernel, needs)
            return loss
        return kernel.forward(*args)
    except RuntimeError:
        check_classes(target, weight.shape[0], ignore_index)
        raise
