from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops

pytestmark = pytest.mark.usefixtures("backend")


def compare(*tensors: torch.Tensor, **options: Any) -> None:
    """Result and gradients of ours and torch's."""
    results = []
    for function in (ops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves: Any = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, **options)
        torch.manual_seed(1)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, torch.randn(y.shape))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def qkv(*leading: int, T: int = 7, S: int = 11, D: int = 16) -> Any:
    return torch.randn(*leading, T, D), torch.randn(*leading, S, D), torch.randn(*leading, S, D)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3), (1, 2, 1, 3)], ids=str)
def test_sdpa_any_number_of_axes(leading: tuple[int, ...]) -> None:
    compare(*qkv(*leading))
    compare(*qkv(*leading), scale=0.2, is_causal=True)


@pytest.mark.parametrize(("T", "S"), [(7, 7), (4, 9), (9, 4)])
def test_sdpa_causal_is_aligned_at_the_start(T: int, S: int) -> None:
    compare(*qkv(2, 3, T=T, S=S), is_causal=True)


@pytest.mark.parametrize("shape", [(7, 11), (3, 7, 11), (2, 1, 7, 11), (2, 3, 1, 11), (1, 1)])
def test_sdpa_masks(shape: tuple[int, ...]) -> None:
    seen = torch.rand(shape) < 0.7
    seen[..., 0] = True
    compare(*qkv(2, 3), attn_mask=seen)
    compare(*qkv(2, 3), attn_mask=torch.randn(shape))


def test_sdpa_mask_of_more_axes() -> None:
    compare(*qkv(2, 2, 3), attn_mask=torch.randn(2, 1, 3, 7, 11))
    compare(*qkv(2, 2, 3), attn_mask=torch.randn(3, 1, 11))


@pytest.mark.parametrize("leading", [(2,), (), (2, 2)], ids=str)
def test_sdpa_enable_gqa(leading: tuple[int, ...]) -> None:
    q, k = torch.randn(*leading, 6, 7, 16), torch.randn(*leading, 2, 11, 16)
    compare(q, k, torch.randn(*leading, 2, 11, 5), enable_gqa=True, is_causal=True)


def test_sdpa_leading_axes_broadcast() -> None:
    q, k, v = torch.randn(2, 3, 7, 16), torch.randn(1, 3, 11, 16), torch.randn(2, 1, 11, 16)
    want = F.scaled_dot_product_attention(q, k.expand(2, 3, 11, 16), v.expand(2, 3, 11, 16))
    torch.testing.assert_close(
        ops.scaled_dot_product_attention(q, k, v), want, rtol=1e-4, atol=1e-6
    )


def test_sdpa_row_that_sees_nothing_is_zero_as_torchs() -> None:
    seen = torch.ones(7, 11, dtype=torch.bool)
    seen[2] = False
    compare(*qkv(2, 3), attn_mask=seen)
    compare(*qkv(2, 3), attn_mask=torch.zeros(7, 11).masked_fill(~seen, -math.inf))
    q, k, v = qkv(2, 3)
    y = ops.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert not y[:, :, 2].any()


def test_sdpa_dropout() -> None:
    q, k, _ = qkv(2, 3, T=64, S=64)
    eye = torch.eye(64).expand(2, 3, 64, 64)
    weights = ops.scaled_dot_product_attention(torch.zeros_like(q), k, eye, dropout_p=0.25)
    assert abs((weights > 0).float().mean().item() - 0.75) < 0.02


def test_sdpa_swaps_in_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    want = layer(x, memory, tgt_mask=mask)
    calls = []

    def ours(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return ops.scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
    torch.testing.assert_close(layer(x, memory, tgt_mask=mask), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_sdpa_errors() -> None:
    q, k, v = qkv(2, 3)
    with pytest.raises(ValueError, match="attn_mask: given together with is_causal"):
        ops.scaled_dot_product_attention(q, k, v, torch.ones(7, 11).bool(), is_causal=True)
    with pytest.raises(ValueError, match=r"key: leading axes don't broadcast.*enable_gqa=True"):
        ops.scaled_dot_product_attention(torch.randn(2, 6, 7, 16), k, v)
    with pytest.raises(ValueError, match="query: got shape"):
        ops.scaled_dot_product_attention(torch.randn(16), k, v)
    with pytest.raises(TypeError, match="key: expected a tensor, got NoneType"):
        ops.scaled_dot_product_attention(q, None, v)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask: got shape"):
        ops.scaled_dot_product_attention(q, k, v, torch.ones(6, 11).bool())
