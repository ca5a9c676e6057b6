from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_layer_norm_equals_torch(weighted: bool, biased: bool) -> None:
    x = torch.randn(5, 3, 97)
    weight, bias = torch.randn(97) if weighted else None, torch.randn(97) if biased else None
    want = F.layer_norm(x, (97,), weight, bias, 1e-4)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-4), want)


def test_layer_norm_gradients_equal_torch() -> None:
    tensors = [torch.randn(5, 97), torch.randn(97), torch.randn(97)]
    cotangent, grads = torch.randn(5, 97), []
    for function in (
        lambda x, w, b: ops.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, (97,), w, b),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(function(*leaves), leaves, cotangent))
    torch.testing.assert_close(*grads)


def test_layer_norm_ignores_offset_and_scale() -> None:
    x = torch.randn(4, 64)
    y = ops.layer_norm(x, eps=0.0)
    torch.testing.assert_close(ops.layer_norm(x * 8 + 3, eps=0.0), y, rtol=1e-4, atol=1e-5)


def test_layer_norm_large_offset_keeps_its_digits() -> None:
    """E[x^2] - E[x]^2 would lose them all at this offset."""
    x = torch.randn(4, 512)
    y = ops.layer_norm(x + 4096.0)
    torch.testing.assert_close(y, ops.layer_norm(x), rtol=0, atol=2e-3)


def test_layer_norm_rows_have_mean_0_and_size_1() -> None:
    y = ops.layer_norm(torch.randn(6, 300) * 5 + 1)
    torch.testing.assert_close(y.mean(-1), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(6), rtol=1e-4, atol=0)


def test_layer_norm_equal_values_give_the_bias() -> None:
    bias = torch.randn(33)
    y = ops.layer_norm(torch.full((2, 33), 0.5), torch.randn(33), bias)
    assert torch.equal(y, bias.expand(2, 33))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_norm_spreads_over_its_row_only(bad: float) -> None:
    x = torch.randn(3, 40)
    clean = ops.layer_norm(x)
    x[1, 7] = bad
    y = ops.layer_norm(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()


def test_layer_norm_row_does_not_depend_on_the_others() -> None:
    x, weight, bias = torch.randn(37, 129), torch.randn(129), torch.randn(129)
    whole = ops.layer_norm(x, weight, bias)
    for row in (0, 17, 36):
        assert torch.equal(ops.layer_norm(x[row], weight, bias), whole[row])


def test_layer_norm_out_takes_the_result() -> None:
    x, weight, bias = torch.randn(5, 64), torch.randn(64), torch.randn(64)
    out = torch.full_like(x, 9.0)
    assert ops.layer_norm(x, weight, bias, out=out) is out
    assert torch.equal(out, ops.layer_norm(x, weight, bias))
    ops.layer_norm(x, weight, bias, out=x)  # in place
    assert torch.equal(x, out)


def test_layer_norm_errors() -> None:
    x = torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"weight: got shape \(63,\), expected \(64,\)"):
        ops.layer_norm(x, torch.ones(63))
    with pytest.raises(ValueError, match=r"bias: got shape \(1, 64\), expected \(64,\)"):
        ops.layer_norm(x, None, torch.ones(1, 64))
    with pytest.raises(TypeError, match=r"bias: got torch.float16"):
        ops.layer_norm(x, None, torch.ones(64).half())
    with pytest.raises(ValueError, match="x: got a scalar"):
        ops.layer_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match="out: got shape"):
        ops.layer_norm(x, out=torch.empty(64))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.layer_norm(x, torch.ones(64, requires_grad=True), out=torch.empty(5, 64))
