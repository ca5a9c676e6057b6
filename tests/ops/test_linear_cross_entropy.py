from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_linear_cross_entropy_equals_torch(reduction: str, biased: bool) -> None:
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
