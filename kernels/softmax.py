"""softmax over the last axis in Triton, masked (masked_softmax.py) or not.

A program holds whole rows in registers (several, where rows are short): each element is read once
and written once, 2 moved per element forward, 3 backward, a mask's besides; bound by memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import launch, rows_of, tile_of_rows


@triton.jit
def forward_kernel(
    x,
    mask,
    y,
    rows,
    width,
    x_stride,
    height,
    heads,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_stride,
    scale,
    EMPTY_IS_ZERO: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADD_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    score = tl.load(x + row * x_stride + column, inside, other=float("-inf")).to(tl.float32)
    score = tl.where(inside, score * scale, float("-inf"))
    if CAUSAL:
        score = tl.where(column <= row % height + (width - height), score, float("-inf"))
    if mask is not None:
        matrix = row // height
        at = (matrix // heads) * mask_batch_stride + (matrix % heads) * mask_head_stride
        at += (row % height) * mask_row_stride + column * mask_stride
        if ADD_MASK:
            # Where the mask says -inf, whatever x holds there is nothing.
            added = tl.load(mask + at, inside, other=float("-inf")).to(tl.float32)
            score = tl.where(added == float("-inf"), added, score + added)
        else:
            seen = tl.load(mask + at, inside, other=0) != 0
            score = tl.where(seen, score, float("-inf"))

    peak = tl.max(score, 1)[:, None]
    if EMPTY_IS_ZERO:
        peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(score - peak)
    total = tl.sum(weight, 1)[:, None]
    if EMPTY_IS_ZERO:
        total = tl.where(total == 0.0, 1.0, total)

    tl.store(y + row * width + column, (weight / total).to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy,
    y,
    dx,
    rows,
    width,
    dy_stride,
    y_stride,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    weight = tl.load(y + row * y_stride + column, inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)

    mean = tl.sum(weight * gradient, 1)[:, None]
    result = weight * (gradient - mean) * scale

    tl.store(dx + row * width + column, result.to(dx.dtype.element_ty), inside)


def into_rows(
    x: torch.Tensor, out: torch.Tensor, *, scale: float = 1.0, masked: dict[str, Any] | None = None
) -> None:
    """out = softmax(x * scale) over the last axis, contiguous; `masked`: the kernel's mask options.

    With `masked`, which has `mask` and its `strides` over 4 axes, `causal`, and x's `height` and
    `heads`, a row that sees nothing is 0.
    """
    if x.numel() == 0:
        return
    options = masked or {
        "mask": None,
        "strides": (0,) * 4,
        "causal": False,
        "height": 1,
        "heads": 1,
    }
    x = rows_of(x)
    mask = options["mask"]
    tile = tile_of_rows(x.shape[1])
    launch(
        forward_kernel,
        (triton.cdiv(x.shape[0], tile["ROWS"]),),
        *(x, mask, out, *x.shape, x.stride(0), options["height"], options["heads"]),
        *(*options["strides"], scale),
        EMPTY_IS_ZERO=masked is not None,
        CAUSAL=options["causal"],
        ADD_MASK=mask is not None and mask.is_floating_point(),
        **tile,
    )


def into(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = softmax(x), contiguous."""
    into_rows(x, out)


def forward(x: torch.Tensor) -> torch.Tensor:
    """softmax(x) over the last axis, of x's shape and dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, out)
    return out


def backward(dy: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """dx of y = softmax(x * scale)."""
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return dx
    dy, y = rows_of(dy), rows_of(y)
    tile = tile_of_rows(y.shape[1])
    launch(
        backward_kernel,
        (triton.cdiv(y.shape[0], tile["ROWS"]),),
        *(dy, y, dx, *y.shape, dy.stride(0), y.stride(0), scale),
        **tile,
    )
    return dx
