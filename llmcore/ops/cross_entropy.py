"""cross_entropy: how unlikely the target classes are under softmax(logits), as torch computes it.

    lp = log_softmax(logits)                                          over the last axis, V classes
    loss_n = -(1 - e) lp[n, target_n] - e / V sum_v lp[n, v]              e = label_smoothing
    none: loss_n, 0 where target_n = ignore_index;  sum: their sum;  mean: sum / number not ignored

Tensors:
    logits  (..., V)  float32, bfloat16, float16 or float64, any strides
    target  (...)     int64, 0 to V - 1 or ignore_index
    loss    () for mean and sum, (...) for none; logits' dtype
Float32: everything up to the loss, which is rounded once.
Edge cases: mean over nothing (no rows, or all ignored) is NaN and sum is 0, as in torch; a NaN in
an ignored row is nothing, forward and backward; -inf logits are fine where the target is another
class and e = 0.
Errors: TypeError for a dtype, ValueError for a shape, a device or an option, IndexError for a
target that is no class (on the CPU; an accelerator's own assertion, and no wait for it, elsewhere).
Source: Szegedy et al., Rethinking the Inception Architecture, 2015, section 7 (smoothing).

Kernels: forward(logits, target, options: LossOptions) -> loss; with keep=True behind, loss and
statistics (N, 2; float32: each row's maximum and the log of its sum relative to it);
backward(dloss, logits, target, statistics, options) -> dlogits. Both raise RuntimeError for a
target that is no class; check_classes then says it better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample

REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """What a cross entropy is told besides its tensors."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"


def reference(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The definition, in at least float32."""
    return loss_of(contract.widen(logits), target, options).to(logits.dtype)


def loss_of(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The loss in the dtype of its logits, at least float32."""
    counted = target != options.ignore_index
    # Ignored rows give nothing, whatever they hold: neither loss nor gradient.
    log_p = logits.masked_fill(~counted[..., None], 0.0).log_softmax(-1)
    picked = log_p.gather(-1, target.masked_fill(~counted, 0)[..., None]).squeeze(-1)
    loss = -picked
    if options.label_smoothing > 0:
        e = options.label_smoothing
        loss = (1 - e) * loss - e / logits.shape[-1] * log_p.sum(-1)
    loss = loss.masked_fill(~counted, 0.0)
    if options.reduction == "none":
        return loss
    return loss.sum() / counted.sum() if options.reduction == "mean" else loss.sum()


def check(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(logits=logits)
    contract.check_rows(logits, "logits")
    check_target(target, logits, "logits")
    if logits.shape[-1] == 0:
        raise ValueError("logits: got no classes on the last axis, expected at least one")
    check_options(options)


def check_target(target: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """target must be int64, like's shape without the last axis; its values are check_classes'."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got {target.dtype}, expected torch.int64 (class numbers)")
    why = f"the shape of {like_name} without its last axis"
    contract.check_shape(like.shape[:-1], why, target=target)
    contract.check_device(like, like_name, target=target)


def check_options(options: LossOptions) -> None:
    """Raises TypeError or ValueError for options out of range."""
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {options.ignore_index!r}")
    contract.check_number(0, 1, label_smoothing=options.label_smoothing)
    contract.check_choice("reduction", options.reduction, REDUCTIONS)


def check_classes(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raises IndexError for a target that is no class, where asking costs no wait (on the CPU)."""
    if not contract.is_known(target) or target.numel() == 0:
        return
    low, high = target.aminmax()
    if low >= 0 and high < classes:
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(
            f"target: got {int(wrong[0])}, expected 0 to {classes - 1}, or ignore_index "
            f"{ignore_index}"
        )


def arguments(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    """The options in one tuple."""
    return logits, target, LossOptions(ignore_index, label_smoothing, reduction)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, classes = draw.size(2, 40), draw.size(2, 700)
    logits, target = draw.normal(rows, classes) * 3, draw.integers(0, classes, rows)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        yield Sample(reduction, (logits, target), options)
        yield Sample(f"{reduction}_smooth", (logits, target), {**options, "label_smoothing": 0.1})
        some = target.masked_fill(draw.chance(0.4, rows), -100)
        some[0] = target[0]
        poisoned = logits.masked_fill((some == -100)[:, None], float("nan"))
        smooth = {**options, "label_smoothing": 0.3}
        yield Sample(f"{reduction}_ignored_nan", (poisoned, some), smooth)
        other = {**options, "ignore_index": int(target[-1])}
        yield Sample(f"{reduction}_ignore_a_class", (logits, target), other)
    wide = (draw.normal(2, 3, 1031), draw.integers(0, 1031, 2, 3))
    yield Sample("2x3x1031", wide, {"reduction": "none"})
    yield Sample("strided", (draw.normal(50, 9).T, draw.integers(0, 50, 9)))
    yield Sample("one_class", (draw.normal(4, 1), draw.integers(0, 1, 4)))
    yield Sample("one_row", (draw.normal(7), draw.integers(0, 7, 1)[0]))
    yield Sample("all_ignored", (draw.normal(3, 7), torch.full((3,), -100)), {"reduction": "sum"})
    yield Sample("no_rows", (draw.normal(0, 7), draw.integers(0, 7, 0)), {"reduction": "none"})
    yield Sample("large_offset", (draw.normal(5, 65) + 200, draw.integers(0, 65, 5)))


@native.fake("cross_entropy_forward")
def _(
    level: int,
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = logits.new_empty(target.shape if REDUCTIONS[reduction] == "none" else ())
    return loss, logits.new_empty(target.numel(), 2, dtype=torch.float32)


@native.fake("cross_entropy_backward")
def _(
    level: int,
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    statistics: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def raw_options(options: LossOptions) -> tuple[int, float, int]:
    """The options as the raw ops take them."""
    number = REDUCTIONS.index(options.reduction)
    return options.ignore_index, options.label_smoothing, number


def with_options(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_backward = candidate.forward, candidate.backward
    assert raw_backward is not None

    def forward(
        logits: torch.Tensor, target: torch.Tensor, options: LossOptions, keep: bool = False
    ) -> Any:
        results = raw_forward(logits, target, *raw_options(options))
        return results if keep else results[0]

    def backward(
        dloss: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        statistics: torch.Tensor,
        options: LossOptions,
    ) -> torch.Tensor:
        return raw_backward(dloss, logits, target, statistics, *raw_options(options))

    return dataclasses.replace(candidate, forward=forward, backward=backward)


def refuses(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> list[str]:
    return native.refuses_tensors(logits)


def refuses_cuda(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> list[str]:
    return native.refuses_kinds(logits)


OP = Op(
    "cross_entropy",
    reference,
    check,
    samples,
    (
        with_options(cuda_candidate("cross_entropy", refuses_cuda, into=False)),
        triton_candidate("cross_entropy", into=False),
        *map(with_options, native_candidates("cross_entropy", refuses, into=False)),
    ),
    arguments=arguments,
)


class CrossEntropy(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        logits: torch.Tensor, target: torch.Tensor, options: LossOptions, kernel: Candidate
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.forward(logits, target, options, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, ctx.options, ctx.kernel = inputs
        _, statistics = output
        ctx.save_for_backward(logits, target, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor | None, _: None) -> tuple[Any, ...]:
        logits, target, statistics = ctx.saved_tensors
        if dloss is None:
            return None, None, None, None
        if contract.differentiated_again():
            again = contract.gradients(
                lambda t: reference(t, target, ctx.options), (logits,), dloss
            )
            return *again, None, None, None
        dlogits = ctx.kernel.backward(dloss, logits, target, statistics, ctx.options)
        return dlogits, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross entropy over the last axis with class numbers as targets, as torch's, in float32.

    logits (..., V); target (...) int64, 0 to V - 1 or ignore_index. reduction "mean" (over targets
    not ignored; NaN when there is none), "sum" or "none". The result has logits' dtype.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
        IndexError: a target is no class (where finding out needs no wait for an accelerator).
    """
    args = arguments(
        logits,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    kernel = OP.kernel(contract.call_key(args[:2], args[2]), *args)
    try:
        if kernel.backward is not None and contract.wants_gradient(logits):
            loss, _ = CrossEntropy.record(*args, kernel)
            return loss
        return kernel.forward(*args)
    except RuntimeError:
        check_classes(target, logits.shape[-1], ignore_index)
        raise
