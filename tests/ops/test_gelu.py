from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")
both = pytest.mark.parametrize("approximate", ["none", "tanh"])


@both
def test_gelu_equals_torch(approximate: str) -> None:
    x = (torch.randn(5, 97) * 4).requires_grad_()
    cotangent = torch.randn(5, 97)
    ours, theirs = (f(x, approximate=approximate) for f in (ops.gelu, F.gelu))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (ours, theirs)))


@both
def test_gelu_difference_of_opposites_is_x(approximate: str) -> None:
    x = torch.linspace(-6, 6, 101)
    difference = ops.gelu(x, approximate) - ops.gelu(-x, approximate)
    torch.testing.assert_close(difference, x, rtol=1e-5, atol=1e-6)


def test_gelu_is_x_times_the_normal_distribution() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    want = torch.tensor([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    torch.testing.assert_close(ops.gelu(x), want)
    near = ops.gelu(x, "tanh")
    torch.testing.assert_close(near, want, rtol=0, atol=5e-4)
    assert not torch.equal(near, want)


@both
def test_gelu_special_values(approximate: str) -> None:
    x = torch.tensor([math.nan, 0.0, 1e30, -1e30])
    y = ops.gelu(x, approximate)
    assert y[0].isnan()
    assert y[1:].tolist() == [0.0, x[2].item(), 0.0]


def test_gelu_of_a_scalar_and_of_nothing() -> None:
    assert ops.gelu(torch.tensor(0.0)).shape == ()
    assert ops.gelu(torch.empty(3, 0)).shape == (3, 0)


@both
def test_gelu_out_takes_the_result(approximate: str) -> None:
    x = torch.randn(5, 64)
    y, room = ops.gelu(x, approximate), torch.empty(5, 64)
    assert ops.gelu(x, approximate, out=room) is room
    assert torch.equal(room, y)
    ops.gelu(x, approximate, out=x)  # in place
    assert torch.equal(x, y)


def test_gelu_errors() -> None:
    x = torch.randn(5)
    with pytest.raises(ValueError, match="approximate: got 'sigmoid', expected one of 'none'"):
        ops.gelu(x, "sigmoid")
    with pytest.raises(ValueError, match="out: got shape"):
        ops.gelu(x, out=torch.empty(4))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.gelu(x.requires_grad_(), out=torch.empty(5))
