"""geglu in Triton; the kernels are activation.py's."""

import torch

from . import activation
from .gelu import KINDS


def into(gate: torch.Tensor, up: torch.Tensor, approximate: str, out: torch.Tensor) -> None:
    """out = gelu(gate, approximate) * up, contiguous."""
    activation.forward(gate, up, KINDS[approximate], out)


def forward(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(gate, approximate) * up, of their shape and dtype."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    into(gate, up, approximate, out)
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, approximate: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dgate, dup."""
    return activation.backward(dy, gate, up, KINDS[approximate])
