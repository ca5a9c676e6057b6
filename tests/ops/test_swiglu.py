from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


def test_swiglu_equals_torch() -> None:
    gate, up = torch.randn(5, 97, requires_grad=True), torch.randn(5, 97, requires_grad=True)
    cotangent = torch.randn(5, 97)
    ours, theirs = ops.swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y, (gate, up), cotangent) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_swiglu_halves_of_one_tensor() -> None:
    halves = torch.randn(4, 6, 66).chunk(2, -1)
    whole = ops.swiglu(*(h.contiguous() for h in halves))
    torch.testing.assert_close(ops.swiglu(*halves), whole)


def test_swiglu_is_linear_in_up_and_odd_in_nothing() -> None:
    gate, up = torch.randn(4, 33), torch.randn(4, 33)
    assert torch.equal(ops.swiglu(gate, up * 4), ops.swiglu(gate, up) * 4)
    silu = ops.swiglu(gate, torch.ones(4, 33))
    torch.testing.assert_close(silu - ops.swiglu(-gate, torch.ones(4, 33)), gate)


def test_swiglu_special_values() -> None:
    gate = torch.tensor([math.nan, math.inf, 0.0, -1e30, 1e30])
    y = ops.swiglu(gate, torch.full((5,), 2.0))
    assert y[0].isnan()
    assert y[1:4].tolist() == [math.inf, 0.0, 0.0]
    assert ops.swiglu(torch.ones(1), torch.tensor([math.nan])).isnan()


def test_swiglu_out_takes_the_result() -> None:
    gate, up = torch.randn(5, 64), torch.randn(5, 64)
    y, room = ops.swiglu(gate, up), torch.empty(5, 64)
    assert ops.swiglu(gate, up, out=room) is room
    assert torch.equal(room, y)
    ops.swiglu(gate, up, out=gate)  # in place
    assert torch.equal(gate, y)


def test_swiglu_errors() -> None:
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"up: got shape \(4,\), expected \(5, 4\)"):
        ops.swiglu(x, x[0])
    with pytest.raises(TypeError, match=r"up: got torch.float16"):
        ops.swiglu(x, x.half())
    with pytest.raises(ValueError, match="up: on meta"):
        ops.swiglu(x, x.to("meta"))
    with pytest.raises(RuntimeError, match="out: has no gradient"):
        ops.swiglu(x, x.clone().requires_grad_(), out=torch.empty(5, 4))
