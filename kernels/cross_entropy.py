"""cross_entropy in Triton: one program a row forward, one a block of a row backward.

Forward reads the logits once, by blocks, with a running maximum: one exponential per element.
Backward reads them again and writes the gradient: 1 element moved per element forward, 2 backward.
A half type's logits take an exponential every 2 bytes, 16 a clock and multiprocessor of an H100,
whose memory gives it 15 bytes in that time: bound by memory, if barely.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import VECTOR, launch, rows_of

MAX_BLOCK = 4096  # a thread of 8 warps holds 16 elements


@triton.jit
def forward_kernel(
    logits,
    target,
    loss,
    statistics,
    width,
    stride,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(target + row)
    counted = (chosen != ignore_index) & (chosen >= 0) & (chosen < width)
    start = logits + row * stride
    picked = tl.load(start + tl.where(counted, chosen, 0)).to(tl.float32)

    peak = tl.full([], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    distance = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        score = tl.load(start + column, inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(score, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = weights * tl.exp(peak - base) + tl.exp(score - base)
        peak = higher
        if SMOOTH:
            distance += tl.where(inside, score - picked, 0.0)

    log_sum = tl.log(tl.sum(weights, 0))
    result = log_sum + (peak - picked)
    if SMOOTH:
        result -= smoothing / width * tl.sum(distance, 0)
    tl.store(loss + row, tl.where(counted, result, 0.0))
    tl.store(statistics + 2 * row, peak)
    tl.store(statistics + 2 * row + 1, log_sum)


@triton.jit
def backward_kernel(
    dloss,
    logits,
    target,
    statistics,
    dlogits,
    width,
    dloss_stride,
    stride,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    chosen = tl.load(target + row)
    score = tl.load(logits + row * stride + column, inside, other=0.0).to(tl.float32)
    peak = tl.load(statistics + 2 * row)
    log_sum = tl.load(statistics + 2 * row + 1)

    wanted = tl.where(column == chosen, 1.0 - smoothing, 0.0) + smoothing / width
    result = (tl.exp(score - peak - log_sum) - wanted) * tl.load(dloss + row * dloss_stride)
    result = tl.where(chosen == ignore_index, 0.0, result)

    tl.store(dlogits + row * width + column, result.to(dlogits.dtype.element_ty), inside)


def counted(target: torch.Tensor, classes: int, ignore_index: int) -> torch.Tensor:
    """Which targets are not ignored; those must be classes, which the device itself asserts."""
    kept = target != ignore_index
    torch._assert_async((~kept | ((target >= 0) & (target < classes))).all())
    return kept


def reduced(
    loss: torch.Tensor, kept: torch.Tensor, reduction: str, dtype: torch.dtype
) -> torch.Tensor:
    """The rows' losses (float32, target's shape) as the reduction wants them, rounded once."""
    if reduction != "none":
        loss = loss.sum() / kept.sum() if reduction == "mean" else loss.sum()
    return loss.to(dtype)


def gradient_of_rows(
    dloss: torch.Tensor, kept: torch.Tensor, reduction: str
) -> tuple[torch.Tensor, int]:
    """The gradient of each row's loss in float32, and the step from one to the next."""
    if reduction == "none":
        return dloss.float().contiguous(), 1
    dloss = dloss.float()
    return (dloss / kept.sum() if reduction == "mean" else dloss), 0


def forward(logits: torch.Tensor, target: torch.Tensor, options: Any, keep: bool = False) -> Any:
    """The loss; with `keep` also each row's maximum and log of its sum, (N, 2) float32."""
    width = logits.shape[-1]
    kept = counted(target, width, options.ignore_index)
    loss = logits.new_empty(target.shape, dtype=torch.float32)
    statistics = logits.new_empty((target.numel(), 2), dtype=torch.float32)
    if target.numel():
        rows = rows_of(logits)
        block = min(triton.next_power_of_2(width), MAX_BLOCK)
        launch(
            forward_kernel,
            (rows.shape[0],),
            *(rows, target.contiguous(), loss, statistics, width, rows.stride(0)),
            *(options.ignore_index, options.label_smoothing),
            SMOOTH=options.label_smoothing > 0,
            BLOCK=block,
            num_warps=max(block // (32 * VECTOR), 1),
        )
    result = reduced(loss, kept, options.reduction, logits.dtype)
    return (result, statistics) if keep else result


def backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    statistics: torch.Tensor,
    options: Any,
) -> torch.Tensor:
    """dlogits, of logits' shape and dtype."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if target.numel() == 0:
        return dlogits
    kept = target != options.ignore_index
    dloss, dloss_stride = gradient_of_rows(dloss, kept, options.reduction)
    rows = rows_of(logits)
    width = rows.shape[1]
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    launch(
        backward_kernel,
        (rows.shape[0] * triton.cdiv(width, block),),
        *(dloss, rows, target.contiguous(), statistics, dlogits, width, dloss_stride),
        *(rows.stride(0), options.ignore_index, options.label_smoothing),
        BLOCK=block,
        num_warps=max(block // (32 * VECTOR), 1),
    )
    return dlogits
