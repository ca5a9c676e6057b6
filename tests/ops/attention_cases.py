"""Calls of attention that its test files share, and how they compare results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def qkv(
    B: int = 2, H: int = 4, G: int = 2, T: int = 7, S: int = 11, D: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6, equal_nan=True)


def same(backend: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit from our kernels; the definition's sums are torch's, which promise no order."""
    if backend == "best":
        assert torch.equal(got, want)
    close(got, want)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
