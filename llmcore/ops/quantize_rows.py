"""quantize_rows: rows in int8 with a scale for each, as a cache keeps keys and values.

    scale = max|x| / 127            of each row along the last axis
    y = round(x / scale)            to nearest, ties to even: -127 to 127
y * scale stands for x, with an error of at most scale / 2 for each element. In float32.
A row of zeros has the scale 0 and zeros; one that holds inf or NaN has the scale NaN and zeros, so
that it stands for NaN. Where max|x| is below 1e-36, so coarse is a float32, y is cut off at 127.

The CPU kernel and the definition give the same bits.
"""

from __future__ import annotations

import math

import torch

from llmcore import native
from llmcore.ops import contract

Pair = tuple[torch.Tensor, torch.Tensor]


def definition(x: torch.Tensor) -> Pair:
    """y and scale in plain PyTorch."""
    wide = x.detach().float()
    largest = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    scale = (largest / 127).where(largest.isfinite(), math.nan)
    of_row = scale[..., None]
    steps = (wide / of_row).round().clamp(-127, 127)
    return steps.where(of_row > 0, 0.0).to(torch.int8), scale


def quantize_rows(x: torch.Tensor, *, out: Pair | None = None) -> Pair:
    """x (..., D) as int8 of the same shape and the scale of each row, (...) float32.

    out: where to write both, any strides with the last axis contiguous: a part of a cache.

    Inference only: the results have no gradient.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    contract.check_floating(x=x)
    contract.check_rows(x)
    if out is not None:
        check_out(x, *out)
    if not takes(x, *(out or ())):
        y, scale = definition(x)
        if out is None:
            return y, scale
        return out[0].copy_(y), out[1].copy_(scale)
    if out is None:
        out = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    store(x.detach(), *out)
    return out


def check_out(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> None:
    """Raises TypeError or ValueError for tensors that cannot hold the results."""
    for tensor, dtype, shape in ((y, torch.int8, x.shape), (scale, torch.float32, x.shape[:-1])):
        if tensor.dtype != dtype:
            raise TypeError(f"out: got {tensor.dtype}, expected {dtype}")
        contract.check_shape(shape, "for the rows of x", out=tensor)
        contract.check_device(x, "x", out=tensor)


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the CPU kernel can: the definition does the rest, to the same bits."""
    return native.module is not None and all(
        t.device.type == "cpu" and t.layout == torch.strided and t.ndim <= 4 for t in tensors
    )


def store(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> None:
    """The CPU kernel's results into y and scale."""
    ahead = (None,) * (4 - x.ndim)
    native.op("store_rows")(native.BEST_LEVEL, x.float()[ahead], y[ahead], scale[ahead])


@native.fake("store_rows")
def _(level: int, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    return None
