from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(5, 3, 97), torch.randn(97)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (97,), weight, 1e-5))


def test_rms_norm_gives_rows_of_unit_size() -> None:
    y = ops.rms_norm(torch.randn(6, 300) * 50, eps=1e-12)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(6))


def test_rms_norm_ignores_the_scale() -> None:
    x = torch.randn(4, 65)
    torch.testing.assert_close(ops.rms_norm(x * 1024, eps=0.0), ops.rms_norm(x, eps=0.0))


def test_rms_norm_adds_eps_under_the_root() -> None:
    y = ops.rms_norm(torch.full((1, 8), 3.0), None, 7.0)
    torch.testing.assert_close(y, torch.full((1, 8), 3.0 / 4.0))


def test_rms_norm_row_of_zeros() -> None:
    assert torch.equal(ops.rms_norm(torch.zeros(2, 33)), torch.zeros(2, 33))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rms_norm_spreads_over_its_row_only(bad: float) -> None:
    x = torch.randn(3, 40)
    clean = ops.rms_norm(x)
    x[1, 7] = bad
    y = ops.rms_norm(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(y[1], F.rms_norm(x[1], (40,), None, 1e-6), equal_nan=True)


def test_rms_norm_out_takes_the_result() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    out = torch.full_like(x, 9.0)
    assert ops.rms_norm(x, weight, out=out) is out
    assert torch.equal(out, ops.rms_norm(x, weight))
    assert ops.rms_norm(x, weight, out=x) is x  # in place
    assert torch.equal(x, out)


def test_rms_norm_out_refuses() -> None:
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match="out: got shape"):
        ops.rms_norm(x, out=torch.empty(5, 63))
    with pytest.raises(TypeError, match=r"out: got torch.float16"):
        ops.rms_norm(x, out=torch.empty(5, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match="out: got strides"):
        ops.rms_norm(x, out=torch.empty(64, 5).T)
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.rms_norm(x.requires_grad_(), out=torch.empty(5, 64))


def test_rms_norm_errors() -> None:
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"weight: got shape \(63,\), expected \(64,\)"):
        ops.rms_norm(x, torch.ones(63))
    with pytest.raises(TypeError, match=r"weight: got torch.float16"):
        ops.rms_norm(x, torch.ones(64).half())
    with pytest.raises(ValueError, match="weight: on meta"):
        ops.rms_norm(x, torch.ones(64, device="meta"))
    with pytest.raises(ValueError, match="x: got a scalar"):
        ops.rms_norm(torch.tensor(1.0))


def test_rms_norm_second_derivative() -> None:
    x = torch.randn(2, 9, requires_grad=True)
    weight = torch.randn(9, requires_grad=True)

    def size_of_the_gradient(function: object) -> tuple[torch.Tensor, ...]:
        y = function(x, weight)  # type: ignore[operator]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    ours = size_of_the_gradient(lambda a, w: ops.rms_norm(a, w, 1e-6))
    theirs = size_of_the_gradient(lambda a, w: F.rms_norm(a, (9,), w, 1e-6))
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)
