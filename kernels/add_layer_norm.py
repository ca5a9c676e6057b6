"""add_layer_norm in Triton; the kernels are row_norm.py's."""

import torch

from . import row_norm


def into(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """total = x + residual, y = layer_norm(total, ...); all (..., C), y and total contiguous."""
    row_norm.forward(x, residual, (weight, bias), eps, y, total, centred=True)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """layer_norm(x + residual, weight, bias, eps) and the sum, (..., C) in x's dtype."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    into(x, residual, weight, bias, eps, y, total)
    return y, total


def backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *needs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (..., C), which is residual's gradient too, dweight and dbias (C), float32."""
    return row_norm.backward(dy, dtotal, total, weight, eps, centred=True)
