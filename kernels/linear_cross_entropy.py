"""linear_cross_entropy in Triton: a matrix product whose tiles leave only their statistics.

Forward: a program has a tile of rows and classes, its logits in registers, and stores each row's
maximum, sum of exponentials and sum: 3 float32 for BLOCK_V logits. Backward: the classes in chunks;
a program computes its logits again and stores their gradient in x's dtype; the products with it,
for dx and dweight, are the GPU library's, which accumulates in float32. dx is a float32 sum over
chunks, in order. 2 N V C operations forward, 6 N V C backward: bound by the tensor cores.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .cross_entropy import counted, gradient_of_rows, reduced
from .launch import factors, launch, precision, target

CHUNKS = 32  # of the classes in the backward pass: so much less memory than all logits take
LEAST_CHUNK = 2048


@triton.jit
def logits_of(
    x,
    weight,
    bias,
    row,
    rows,
    column,
    classes,
    width,
    x_stride,
    weight_stride,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of x @ weight.T + bias in float32."""
    logits = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    inner = tl.arange(0, BLOCK_C)[None, :]
    x_at = x + row.to(tl.int64)[:, None] * x_stride + inner
    weight_at = weight + column.to(tl.int64)[:, None] * weight_stride + inner
    is_row, is_class = (row < rows)[:, None], (column < classes)[:, None]
    for first in tl.range(0, width, BLOCK_C):
        within = inner < width - first
        x_tile = tl.load(x_at + first, is_row & within, other=0.0).to(COMPUTE)
        weight_tile = tl.load(weight_at + first, is_class & within, other=0.0).to(COMPUTE)
        logits = tl.dot(x_tile, tl.trans(weight_tile), logits, input_precision=PRECISION)
    if bias is not None:
        logits += tl.load(bias + column, column < classes, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    target,
    peaks,
    sums,
    distances,
    picked,
    rows,
    classes,
    width,
    x_stride,
    weight_stride,
    SMOOTH: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0) // row_tiles  # rows innermost: a tile of classes is read once
    row = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = logits_of(
        *(x, weight, bias, row, rows, column, classes, width, x_stride, weight_stride),
        COMPUTE,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_C,
    )

    is_row, is_class = row < rows, (column < classes)[None, :]
    score = tl.where(is_class, logits, float("-inf"))
    peak = tl.max(score, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    at = tile.to(tl.int64) * rows + row
    tl.store(peaks + at, peak, is_row)
    tl.store(sums + at, tl.sum(tl.exp(score - base[:, None]), 1), is_row)
    if SMOOTH:
        distance = tl.where(is_class, logits - base[:, None], 0.0)
        tl.store(distances + at, tl.sum(distance, 1), is_row)
    chosen = tl.load(target + row, is_row, other=-1)
    is_chosen = column[None, :] == chosen[:, None]
    found = (chosen >= tile * BLOCK_V) & (chosen < tl.minimum((tile + 1) * BLOCK_V, classes))
    tl.store(picked + row, tl.sum(tl.where(is_chosen, logits, 0.0), 1), is_row & found)


@triton.jit
def gradient_kernel(
    dloss,
    x,
    weight,
    bias,
    target,
    statistics,
    dlogits,
    rows,
    first_class,
    last_class,
    classes,
    width,
    dloss_stride,
    x_stride,
    weight_stride,
    dlogits_stride,
    ignore_index,
    smoothing,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (tl.program_id(0) // row_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = first_class + place
    logits = logits_of(
        *(x, weight, bias, row, rows, column, last_class, width, x_stride, weight_stride),
        COMPUTE,
        PRECISION,
        BLOCK_M,
        BLOCK_V,
        BLOCK_C,
    )

    is_row = row < rows
    chosen = tl.load(target + row, is_row, other=0)
    peak = tl.load(statistics + 2 * row, is_row, other=0.0)
    log_sum = tl.load(statistics + 2 * row + 1, is_row, other=0.0)
    scale = tl.load(dloss + row.to(tl.int64) * dloss_stride, is_row, other=0.0)
    wanted = tl.where(column[None, :] == chosen[:, None], 1.0 - smoothing, 0.0)
    result = tl.exp(logits - peak[:, None] - log_sum[:, None]) - (wanted + smoothing / classes)
    result = tl.where((chosen == ignore_index)[:, None], 0.0, result * scale[:, None])

    at = dlogits + row.to(tl.int64)[:, None] * dlogits_stride + place[None, :]
    inside = is_row[:, None] & (column < last_class)[None, :]
    tl.store(at, result.to(dlogits.dtype.element_ty), inside)


def tiles_of(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks, warps and stages by registers and shared memory, pruned by the rows.

    128 x 128 logits are 64 registers of each thread of 8 warps; stages hold 2 * 128 * 64 halves,
    32 KiB each.
    """
    one_stage = target().backend == "hip"
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    tile = {"BLOCK_M": block_m, "num_warps": 8 if block_m == 128 else 4}
    if dtype == torch.float32:
        block_m = min(64, block_m)
        tile = {"BLOCK_M": block_m, "BLOCK_V": 64, "BLOCK_C": 32, "num_warps": 4}
        return {**tile, "num_stages": 1 if one_stage else 2}
    return {**tile, "BLOCK_V": 128, "BLOCK_C": 64, "num_stages": 1 if one_stage else 3}


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """(..., C) as (N, C) with neighbours side by side; C may be 0."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 0 else rows.contiguous()


def constants(x: torch.Tensor, rows: int) -> dict[str, Any]:
    """The kernels' constants."""
    compute = factors(x, x)
    name = str(compute).removeprefix("torch.")
    kind = {"COMPUTE": getattr(tl, name), "PRECISION": precision(compute)}
    return {**kind, **tiles_of(rows, compute)}


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    options: Any,
    needs: tuple[bool, bool, bool] | None = None,
) -> Any:
    """The loss; given `needs`, also each row's maximum and log of its sum, (N, 2) float32."""
    classes, width = weight.shape
    kept = counted(target, classes, options.ignore_index)
    rows = target.numel()
    matrix, weight = as_matrix(x), as_matrix(weight)
    smooth = options.label_smoothing > 0
    loss = x.new_zeros(target.shape, dtype=torch.float32)
    statistics = x.new_empty((rows, 2), dtype=torch.float32)
    if rows:
        meta = constants(x, rows)
        tiles = triton.cdiv(classes, meta["BLOCK_V"])
        peaks = loss.new_empty(tiles, rows)
        sums = torch.empty_like(peaks)
        distances = torch.empty_like(peaks) if smooth else None
        picked = loss.new_empty(rows)
        launch(
            forward_kernel,
            (triton.cdiv(rows, meta["BLOCK_M"]) * tiles,),
            *(matrix, weight, None if bias is None else bias.contiguous(), target.contiguous()),
            *(peaks, sums, distances, picked, rows, classes, width),
            *(matrix.stride(0), weight.stride(0)),
            SMOOTH=smooth,
            **meta,
        )
        peak = peaks.amax(0)
        log_sum = (sums * torch.exp(peaks - peak)).sum(0).log()
        row_loss = log_sum + (peak - picked)
        if smooth:
            counts = torch.full_like(peaks[:, :1], meta["BLOCK_V"])
            counts[-1] = classes - (tiles - 1) * meta["BLOCK_V"]
            distance = (distances + counts * (peaks - picked)).sum(0)
            row_loss = row_loss - options.label_smoothing / classes * distance
        loss = row_loss.reshape(target.shape).masked_fill(~kept, 0.0)
        statistics = torch.stack((peak, log_sum), 1)
    result = reduced(loss, kept, options.reduction, x.dtype)
    return result if needs is None else (result, statistics)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, by the GPU's library; in the interpreter by the CPU's."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    options: Any,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias (float32); empty where not needed."""
    classes, width = weight.shape
    rows = target.numel()
    need_dx, need_dweight, need_dbias = needs
    dx = x.new_zeros((rows, width) if need_dx else (0,), dtype=torch.float32)
    dweight = torch.zeros_like(weight) if need_dweight else weight.new_empty(0)
    dbias = x.new_zeros(classes if need_dbias else 0, dtype=torch.float32)
    if rows:
        kept = target != options.ignore_index
        dloss, dloss_stride = gradient_of_rows(dloss, kept, options.reduction)
        matrix, weight = as_matrix(x), as_matrix(weight)
        meta = constants(x, rows)
        chunk = max(triton.cdiv(classes, CHUNKS * 128) * 128, LEAST_CHUNK)
        dlogits = x.new_empty(rows, min(chunk, triton.cdiv(classes, 16) * 16))
        for first in range(0, classes, chunk):
            last = min(first + chunk, classes)
            launch(
                gradient_kernel,
                (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(last - first, meta["BLOCK_V"]),),
                *(dloss, matrix, weight, None if bias is None else bias.contiguous()),
                *(target.contiguous(), statistics, dlogits, rows, first, last, classes, width),
                *(dloss_stride, matrix.stride(0), weight.stride(0), dlogits.stride(0)),
                *(options.ignore_index, options.label_smoothing),
                **meta,
            )
            part = dlogits[:, : last - first]
            if need_dx:
                dx += product(part, weight[first:last])
            if need_dweight:
                dweight[first:last] = product(part.T, matrix)
            if need_dbias:
                dbias[first:last] = part.sum(0, dtype=torch.float32)
    return dx.to(x.dtype).view(x.shape) if need_dx else x.new_empty(0), dweight, dbias
