from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_the_two_plain_ops(dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 3, 97).to(dtype), torch.randn(5, 3, 97).to(dtype)
    weight = torch.randn(97)
    y, total = ops.add_rms_norm(x, residual, weight, 1e-4)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, ops.rms_norm(x + residual, weight, 1e-4))


def test_add_rms_norm_order_of_the_sum_is_free() -> None:
    x, residual = torch.randn(4, 33), torch.randn(4, 33)
    one, other = ops.add_rms_norm(x, residual), ops.add_rms_norm(residual, x)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_add_rms_norm_promotes_as_the_sum_does() -> None:
    x, residual = torch.randn(4, 33).bfloat16(), torch.randn(4, 33)
    for pair in ((x, residual), (residual, x)):
        y, total = ops.add_rms_norm(*pair)
        assert y.dtype == total.dtype == torch.float32
        assert torch.equal(total, x + residual)


def test_add_rms_norm_gradient_reaches_both_from_both() -> None:
    x, residual = torch.randn(4, 33, requires_grad=True), torch.randn(4, 33, requires_grad=True)
    cotangents = (torch.randn(4, 33), torch.randn(4, 33))
    dx, dresidual = torch.autograd.grad(ops.add_rms_norm(x, residual), (x, residual), cotangents)
    assert torch.equal(dx, dresidual)
    total = (x + residual).detach().requires_grad_()
    (want,) = torch.autograd.grad((ops.rms_norm(total), total * 1), total, cotangents)
    torch.testing.assert_close(dx, want)


def test_add_rms_norm_out_may_be_the_residual() -> None:
    x, residual = torch.randn(4, 33), torch.randn(4, 33)
    y, total = ops.add_rms_norm(x, residual)
    room = torch.empty(4, 33)
    results = ops.add_rms_norm(x, residual, out=(room, residual))
    assert results[0] is room and results[1] is residual
    assert torch.equal(room, y) and torch.equal(residual, total)


def test_add_rms_norm_errors() -> None:
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"residual: got shape \(64,\), expected \(5, 64\)"):
        ops.add_rms_norm(x, x[0])
    with pytest.raises(TypeError, match=r"residual: got torch.int64"):
        ops.add_rms_norm(x, x.long())
    with pytest.raises(TypeError, match=r"weight: got torch.float16"):
        ops.add_rms_norm(x, x, torch.ones(64).half())
    with pytest.raises(ValueError, match=r"weight: got shape \(63,\)"):
        ops.add_rms_norm(x, x, torch.ones(63))
    with pytest.raises(TypeError, match="out: expected a pair"):
        ops.add_rms_norm(x, x, out=torch.empty(5, 64))  # type: ignore[arg-type]
    room = torch.empty(5, 64)
    with pytest.raises(ValueError, match="out: got one tensor twice"):
        ops.add_rms_norm(x, x, out=(room, room))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.add_rms_norm(x.requires_grad_(), x, out=(room, torch.empty(5, 64)))


def test_add_rms_norm_second_derivative() -> None:
    x, residual, weight = (torch.randn(*s, requires_grad=True) for s in ((2, 9), (2, 9), (9,)))

    def size_of_the_gradient(function: object) -> tuple[torch.Tensor, ...]:
        y, total = function(x, residual, weight)  # type: ignore[operator]
        loss = y.square().sum() + total.pow(3).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, residual, weight))

    def plain(x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor) -> object:
        return F.rms_norm(x + residual, (9,), *rest, 1e-6), x + residual

    ours, theirs = size_of_the_gradient(ops.add_rms_norm), size_of_the_gradient(plain)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)


def test_add_rms_norm_gradient_of_the_sum_alone() -> None:
    x, residual = torch.randn(4, 33, requires_grad=True), torch.randn(4, 33)
    _, total = ops.add_rms_norm(x, residual)
    (dx,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(dx, torch.ones(4, 33))
