"""rms_norm in Triton; the kernels are row_norm.py's."""

import torch

from . import row_norm


def into(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
    """out = rms_norm(x, weight, eps); x (..., C), out contiguous."""
    row_norm.forward(x, None, (weight, None), eps, out, None, centred=False)


def forward(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """rms_norm(x, weight, eps), (..., C) in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, weight, eps, out)
    return out


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (..., C) and dweight (C), float32."""
    return row_norm.backward(dy, None, x, weight, eps, centred=False)[:2]
