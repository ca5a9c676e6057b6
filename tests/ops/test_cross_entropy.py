from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcore import native, ops

pytestmark = pytest.mark.usefixtures("backend")

REDUCTIONS = ("mean", "sum", "none")


def torchs(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    flat = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return flat.reshape(target.shape) if options.get("reduction") == "none" else flat


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cross_entropy_equals_torch(
    reduction: str, label_smoothing: float, ignore_index: int, dtype: torch.dtype
) -> None:
    logits, target = (torch.randn(4, 6, 11) * 3).to(dtype), torch.randint(0, 11, (4, 6))
    target[0, :2] = ignore_index
    options: Any = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    results = []
    for function in (ops.cross_entropy, torchs):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target, **options)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    # torch's bfloat16 path rounds in between; ours rounds once.
    tolerance: Any = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_all_ignored_as_torch(reduction: str) -> None:
    logits, target = torch.randn(3, 5), torch.full((3,), -100)
    ours = ops.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torchs(logits, target, reduction=reduction), equal_nan=True)
    assert ours.isnan().all() == (reduction == "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_no_rows_as_torch(reduction: str) -> None:
    logits, target = torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)
    want = torchs(logits, target, reduction=reduction)
    torch.testing.assert_close(
        ops.cross_entropy(logits, target, reduction=reduction), want, equal_nan=True
    )


def test_cross_entropy_of_even_logits_is_log_of_their_number() -> None:
    loss = ops.cross_entropy(torch.full((4, 17), 2.0), torch.randint(0, 17, (4,)))
    torch.testing.assert_close(loss, torch.tensor(math.log(17.0)))


def test_cross_entropy_ignores_a_shift() -> None:
    logits, target = torch.randint(-8, 8, (4, 33)).float(), torch.randint(0, 33, (4,))
    loss = ops.cross_entropy(logits, target)
    torch.testing.assert_close(ops.cross_entropy(logits + 512, target), loss, rtol=1e-5, atol=1e-6)


def test_cross_entropy_gradient_rows_sum_to_zero() -> None:
    logits = torch.randn(4, 33, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.randint(0, 33, (4,)), label_smoothing=0.2)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(4), rtol=0, atol=1e-6)


def test_cross_entropy_ignored_rows_may_hold_nan() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([1, -100, 2])
    want = ops.cross_entropy(logits[[0, 2]], target[[0, 2]])
    logits[1] = math.nan
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, target)
    torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad[1], torch.zeros(5)) and grad.isfinite().all()


@pytest.mark.parametrize(
    "row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [0.0, -math.inf, 1.0]], ids=str
)
@pytest.mark.parametrize("target", [0, 1])
def test_cross_entropy_special_values_as_torch(row: list[float], target: int) -> None:
    logits, label = torch.tensor([row]), torch.tensor([target])
    for smoothing in (0.0, 0.1):
        want = torchs(logits, label, label_smoothing=smoothing)
        ours = ops.cross_entropy(logits, label, label_smoothing=smoothing)
        torch.testing.assert_close(ours, want, equal_nan=True)


def test_cross_entropy_one_row_without_axes() -> None:
    logits = torch.randn(7)
    loss = ops.cross_entropy(logits, torch.tensor(3), reduction="none")
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(3)))


@pytest.mark.parametrize("wrong", [5, -1, 99])
def test_cross_entropy_target_that_is_no_class(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"target: got {wrong}, expected 0 to 4"):
        ops.cross_entropy(torch.randn(3, 5), torch.tensor([0, wrong, -100]))


def test_cross_entropy_errors() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r"target: got torch.int32, expected torch.int64"):
        ops.cross_entropy(logits, target.int())
    with pytest.raises(TypeError, match="target: expected a tensor, got int"):
        ops.cross_entropy(logits, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target: got shape \(2,\), expected \(3,\)"):
        ops.cross_entropy(logits, target[:2])
    with pytest.raises(ValueError, match="target: on meta"):
        ops.cross_entropy(logits, target.to("meta"))
    with pytest.raises(ValueError, match="logits: got no classes"):
        ops.cross_entropy(torch.randn(3, 0), target)
    with pytest.raises(ValueError, match=r"label_smoothing: got 1.5, expected a number in \[0, 1"):
        ops.cross_entropy(logits, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction: got 'average', expected one of 'mean'"):
        ops.cross_entropy(logits, target, reduction="average")
    with pytest.raises(TypeError, match="ignore_index: expected an int"):
        ops.cross_entropy(logits, target, ignore_index=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_second_derivative(reduction: str) -> None:
    logits, target = torch.randn(3, 9, requires_grad=True), torch.tensor([1, -100, 8])
    results = []
    for function in (ops.cross_entropy, torchs):
        loss = function(logits, target, reduction=reduction, label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss.square().sum(), logits, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_long_row_whose_maximum_grows(smoothing: float) -> None:
    """More than a kernel reads at once; it starts with -inf, as a masked vocabulary may."""
    logits = torch.linspace(-40, 30, 13001).repeat(2, 1)
    if smoothing == 0:
        logits[:, :5000] = -math.inf
    logits = (logits + 900).requires_grad_()
    target, results = torch.tensor([12000, 6000]), []
    for function in (ops.cross_entropy, torchs):
        loss = function(logits, target, label_smoothing=smoothing)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_cross_entropy_raw_op_checks_targets_too() -> None:
    if native.module is None:
        pytest.skip(native.why_not)
    forward = native.op("cross_entropy_forward")
    with pytest.raises(RuntimeError, match="target: got 5, expected 0 to 4"):
        forward(native.BEST_LEVEL, torch.randn(1, 5), torch.tensor([5]), -100, 0.0, 0)
