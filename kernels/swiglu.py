"""swiglu in Triton; the kernels are activation.py's."""

import torch

from . import activation


def into(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, contiguous."""
    activation.forward(gate, up, "silu", out)


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of their shape and dtype."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    into(gate, up, out)
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dgate, dup."""
    return activation.backward(dy, gate, up, "silu")
