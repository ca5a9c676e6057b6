from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")
both = pytest.mark.parametrize("approximate", ["none", "tanh"])


@both
def test_geglu_equals_torch(approximate: str) -> None:
    gate, up = torch.randn(5, 97, requires_grad=True), torch.randn(5, 97, requires_grad=True)
    cotangent = torch.randn(5, 97)
    ours = ops.geglu(gate, up, approximate)
    theirs = F.gelu(gate, approximate=approximate) * up
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y, (gate, up), cotangent) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


@both
def test_geglu_of_ones_is_gelu(approximate: str) -> None:
    gate = torch.randn(4, 33)
    y = ops.geglu(gate, torch.ones(4, 33), approximate)
    torch.testing.assert_close(y, ops.gelu(gate, approximate))
    assert torch.equal(ops.geglu(gate, torch.full((4, 33), 4.0), approximate), y * 4)


def test_geglu_approximation_is_told_apart() -> None:
    gate, up = torch.randn(4, 33), torch.randn(4, 33)
    assert not torch.equal(ops.geglu(gate, up, "none"), ops.geglu(gate, up, "tanh"))


@both
def test_geglu_out_takes_the_result(approximate: str) -> None:
    gate, up = torch.randn(5, 64), torch.randn(5, 64)
    y, room = ops.geglu(gate, up, approximate), torch.empty(5, 64)
    assert ops.geglu(gate, up, approximate, out=room) is room
    assert torch.equal(room, y)
    ops.geglu(gate, up, approximate, out=up)  # in place
    assert torch.equal(up, y)


def test_geglu_errors() -> None:
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"up: got shape \(4,\), expected \(5, 4\)"):
        ops.geglu(x, x[0])
    with pytest.raises(TypeError, match=r"up: got torch.float16"):
        ops.geglu(x, x.half())
    with pytest.raises(ValueError, match="approximate: got 'fast'"):
        ops.geglu(x, x, "fast")
