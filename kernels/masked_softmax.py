"""masked_softmax in Triton; the kernels are softmax.py's."""

import math

import torch

from . import softmax


def into(
    x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float, out: torch.Tensor
) -> None:
    """out = masked_softmax(x, ...), contiguous; x (..., T, S), mask broadcastable to it."""
    height = x.shape[-2] if x.ndim > 1 else 1
    heads = x.shape[-3] if x.ndim > 2 else 1
    if mask is not None:
        mask = mask.expand(x.shape)
        batch = math.prod(x.shape[:-3])
        # Broadcast axes stay without memory: a view, unless there are axes before (B, H, T, S).
        mask = mask.reshape(batch, *((1, 1, 1, *x.shape)[-3:])) if x.ndim != 4 else mask
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    options = {
        "mask": mask,
        "strides": (0,) * 4 if mask is None else mask.stride(),
        "causal": causal,
        "height": height,
        "heads": heads,
    }
    softmax.into_rows(x, out, scale=scale, masked=options)


def forward(x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float) -> torch.Tensor:
    """masked_softmax(x, ...), of x's shape and dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, mask, causal, scale, out)
    return out


def backward(dy: torch.Tensor, y: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """dx."""
    return softmax.backward(dy, y, scale)
