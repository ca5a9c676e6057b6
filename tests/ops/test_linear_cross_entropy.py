from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops
from llmcore.dispatch import REGISTRY

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def with_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native forward pass makes the gradients as well, however few the rows."""
    monkeypatch.setattr(REGISTRY["linear_cross_entropy"], "chosen", {})
    module = importlib.import_module("llmcore.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "ROWS_FOR_GRADIENTS", 0)


@pytest.mark.parametrize("early", [False, True], ids=["", "gradients_with_loss"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_linear_cross_entropy_equals_torch(
    reduction: str, biased: bool, early: bool, request: pytest.FixtureRequest
) -> None:
    if early:
        request.getfixturevalue("with_loss")
    tensors = [torch.randn(4, 6, 16), torch.randn(33, 16), torch.randn(33)]
    target = torch.randint(0, 33, (4, 6))
    target[0, 0] = -100
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}

    def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = F.linear(x, weight, bias).flatten(0, 1)
        return F.cross_entropy(flat, target.flatten(), **options)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return ops.linear_cross_entropy(x, weight, target, bias, **options).flatten()

    results = []
    for function in (ours, torchs):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        loss = function(x, weight, bias if biased else None).sum()
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad, bias.grad if biased else x.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_is_the_two_plain_ops() -> None:
    x, weight, target = torch.randn(9, 16), torch.randn(50, 16), torch.randint(0, 50, (9,))
    fused = ops.linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(fused, ops.cross_entropy(ops.linear(x, weight), target))


def test_linear_cross_entropy_bits_are_a_rows_own(backend: str) -> None:
    """Of so many rows and classes that each thread takes a part of them."""
    if backend == "reference":
        pytest.skip("the definition's sums are torch's, whose order depends on the number of rows")
    x, weight, target = torch.randn(230, 33), torch.randn(1031, 33), torch.randint(0, 1031, (230,))

    def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
        mine = x[rows].clone().requires_grad_()
        loss = ops.linear_cross_entropy(mine, weight, target[rows], reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), mine)[0]

    whole = of_rows(slice(None))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, of_rows(slice(None)), whole))
        for rows in (slice(0, 40), slice(99, 230)):
            assert all(map(torch.equal, of_rows(rows), [t[rows] for t in whole]))
    torch.set_num_threads(1)


def test_linear_cross_entropy_logits_are_never_rounded() -> None:
    """Logits of 300 would lose 1 in bfloat16; the loss shows that they did not."""
    x = torch.tensor([[1.0, 256.0]]).bfloat16()
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).bfloat16()  # logits 257 and 256
    loss = ops.linear_cross_entropy(x, weight, torch.tensor([0]))
    torch.testing.assert_close(
        loss.float(), torch.tensor(math.log1p(math.exp(-1))), rtol=4e-3, atol=0
    )


def test_linear_cross_entropy_autocast() -> None:
    x, weight, target = torch.randn(9, 16), torch.randn(50, 16), torch.randint(0, 50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target)
    want = ops.linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target)
    assert loss.dtype == torch.bfloat16 and torch.equal(loss, want)


def test_linear_cross_entropy_errors() -> None:
    x, weight, target = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"weight: got shape \(7, 4\), expected \(V, 5\)"):
        ops.linear_cross_entropy(torch.randn(3, 5), weight, target)
    with pytest.raises(ValueError, match=r"weight: got shape .* V >= 1"):
        ops.linear_cross_entropy(x, weight[:0], target)
    with pytest.raises(TypeError, match=r"weight: got torch.float16"):
        ops.linear_cross_entropy(x, weight.half(), target)
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), expected \(7,\)"):
        ops.linear_cross_entropy(x, weight, target, torch.randn(4))
    with pytest.raises(ValueError, match=r"target: got shape \(2,\), expected \(3,\)"):
        ops.linear_cross_entropy(x, weight, target[:2])
    with pytest.raises(IndexError, match="target: got 7, expected 0 to 6"):
        ops.linear_cross_entropy(x, weight, target + 5)
    with pytest.raises(ValueError, match=r"label_smoothing: got -0.5"):
        ops.linear_cross_entropy(x, weight, target, label_smoothing=-0.5)


@pytest.mark.usefixtures("with_loss")
@pytest.mark.parametrize("rows, width, classes", [(230, 33, 1031), (40, 100, 700), (7, 5, 3)])
def test_linear_cross_entropy_gradients_with_the_loss(rows: int, width: int, classes: int) -> None:
    """The same loss as without, float64's gradients, times what comes back, at every pass anew."""
    x, weight = torch.randn(rows, width), torch.randn(classes, width) * width**-0.5
    bias, target = torch.randn(classes), torch.randint(0, classes, (rows,))
    target[::3] = -100
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    want = F.cross_entropy(F.linear(*wide), target, label_smoothing=0.1)
    exact = torch.autograd.grad(want, wide)
    loss = ops.linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1)
    with torch.no_grad():
        assert torch.equal(
            loss, ops.linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1)
        )
    for factor in (1.0, -3.0, 1.0):
        found = torch.autograd.grad(loss, inputs, torch.tensor(factor), retain_graph=True)
        for gradient, true in zip(found, exact, strict=True):
            torch.testing.assert_close(gradient.double(), true * factor, rtol=1e-4, atol=1e-6)
            gradient.zero_()  # what a user does to his gradient reaches no later pass


@pytest.mark.usefixtures("with_loss")
def test_linear_cross_entropy_gradients_with_the_loss_times_a_batch() -> None:
    """What comes back is no number then; the gradients are there for the next pass all the same."""
    x, weight = torch.randn(40, 16).requires_grad_(), torch.randn(60, 16).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.randint(0, 60, (40,)))
    both = torch.tensor([1.0, -2.0])
    batched = torch.autograd.grad(loss, (x, weight), both, retain_graph=True, is_grads_batched=True)
    for one, several in zip(torch.autograd.grad(loss, (x, weight)), batched, strict=True):
        assert torch.equal(several, torch.stack((one, -2.0 * one)))


@pytest.mark.usefixtures("with_loss")
def test_linear_cross_entropy_gradients_with_the_loss_of_one_input() -> None:
    target = torch.randint(0, 90, (50,))
    tensors = torch.randn(50, 20), torch.randn(90, 20), torch.randn(90)

    def gradients(needs: tuple[bool, ...]) -> list[torch.Tensor | None]:
        x, weight, bias = (t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True))
        ops.linear_cross_entropy(x, weight, target, bias, reduction="sum").backward()
        return [x.grad, weight.grad, bias.grad]

    every = gradients((True, True, True))
    for i in range(3):
        alone = gradients(tuple(j == i for j in range(3)))
        assert torch.equal(alone[i], every[i])
        assert all(g is None for j, g in enumerate(alone) if j != i)


@pytest.mark.usefixtures("with_loss")
def test_linear_cross_entropy_gradients_of_no_rows() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    ops.linear_cross_entropy(x, weight, target, reduction="sum").backward()
    assert x.grad.shape == (0, 8) and not weight.grad.any()


@pytest.mark.usefixtures("with_loss")
def test_linear_cross_entropy_gradients_with_the_loss_on_any_number_of_threads() -> None:
    x, weight = torch.randn(300, 100).requires_grad_(), torch.randn(2000, 100).requires_grad_()
    target = torch.randint(0, 2000, (300,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = ops.linear_cross_entropy(x, weight, target)
            found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
