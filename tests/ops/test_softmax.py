from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
def test_softmax_equals_torch(dim: int) -> None:
    x = torch.randn(5, 3, 97) * 4
    torch.testing.assert_close(ops.softmax(x, dim), F.softmax(x, dim))


def test_softmax_gradient_equals_torch() -> None:
    x, cotangent = torch.randn(5, 97, requires_grad=True), torch.randn(5, 97)
    grads = [torch.autograd.grad(f(x, -1), x, cotangent)[0] for f in (ops.softmax, F.softmax)]
    torch.testing.assert_close(*grads)


def test_softmax_ignores_a_shift() -> None:
    x = torch.randint(-8, 8, (4, 65)).float()
    assert torch.equal(ops.softmax(x + 1024), ops.softmax(x))  # the sums are exact


def test_softmax_sums_to_one_and_keeps_the_order() -> None:
    x = torch.randn(6, 300) * 5
    y = ops.softmax(x)
    torch.testing.assert_close(y.sum(-1), torch.ones(6))
    assert (y.gather(-1, x.argsort(-1)).diff() >= 0).all()


def test_softmax_survives_large_logits() -> None:
    y = ops.softmax(torch.tensor([3e38, -3e38, 3e38]))
    assert torch.equal(y, torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize(
    "row",
    [
        [0.0, math.nan, 1.0],
        [0.0, math.inf, 1.0],
        [-math.inf, -math.inf, -math.inf],
        [-math.inf, 0.0, 0.0],
    ],
    ids=["nan", "inf", "all_minus_inf", "minus_inf"],
)
def test_softmax_special_values_as_torch(row: list[float]) -> None:
    x = torch.stack((torch.tensor(row), torch.zeros(3)))
    torch.testing.assert_close(ops.softmax(x), F.softmax(x, -1), equal_nan=True)


def test_softmax_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(37, 129)
    whole = ops.softmax(x)
    for row in (0, 17, 36):
        assert torch.equal(ops.softmax(x[row]), whole[row])


def test_softmax_out_takes_the_result() -> None:
    x = torch.randn(5, 64)
    out = torch.full_like(x, 9.0)
    assert ops.softmax(x, out=out) is out
    assert torch.equal(out, ops.softmax(x))
    ops.softmax(x, out=x)  # in place
    assert torch.equal(x, out)


def test_softmax_errors() -> None:
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match="dim: x has 2 axes, expected -2 to 1"):
        ops.softmax(x, 2)
    with pytest.raises(ValueError, match="dim: x has 2 axes"):
        ops.softmax(x, -3)
    with pytest.raises(TypeError, match="dim: expected an int, got str"):
        ops.softmax(x, "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: got a scalar"):
        ops.softmax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="out: got shape"):
        ops.softmax(x, out=torch.empty(64, 5))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.softmax(x.requires_grad_(), out=torch.empty(5, 64))
