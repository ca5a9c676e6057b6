"""layer_norm in Triton; the kernels are row_norm.py's."""

import torch

from . import row_norm


def into(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """out = layer_norm(x, weight, bias, eps); x (..., C), out contiguous."""
    row_norm.forward(x, None, (weight, bias), eps, out, None, centred=True)


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """layer_norm(x, weight, bias, eps), (..., C) in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, weight, bias, eps, out)
    return out


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, *needs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (..., C), dweight and dbias (C), float32."""
    return row_norm.backward(dy, None, x, weight, eps, centred=True)
