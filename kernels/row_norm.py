"""rms_norm and layer_norm, with and without a sum before: one kernel forward, one backward.

A program holds whole rows in registers (several, where rows are short), so each element is read
once and written once: 2 elements moved per element forward (4 with the sum), 3 backward (4); the
arithmetic is hidden behind them (bound by memory). The statistics are recomputed by the backward
pass, which runs a fixed number of programs: each adds up dweight and dbias over its own rows, and
the partial sums are added in order. No atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, rows_of, tile_of_rows

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@triton.jit
def unit_rows(rows, inside, width, eps, CENTRED: tl.constexpr):
    """Rows of size 1 (centred, with CENTRED), and what they were multiplied by."""
    if CENTRED:
        rows = tl.where(inside, rows - (tl.sum(rows, 1) / width)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(rows * rows, 1) / width + eps)[:, None]
    return rows * inverse, inverse


@triton.jit
def load(start, stride, row, column, inside):
    """A tile of rows in float32, zeros outside."""
    return tl.load(start + row * stride + column, inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    values = load(x, x_stride, row, column, inside)
    if residual is not None:
        values += load(residual, residual_stride, row, column, inside)
        values = values.to(total.dtype.element_ty).to(tl.float32)

    result, _ = unit_rows(values, inside, width, eps, CENTRED)
    if weight is not None:
        result *= load(weight, 0, row, column, column < width)
    if bias is not None:
        result += load(bias, 0, row, column, column < width)

    tl.store(y + row * width + column, result.to(y.dtype.element_ty), inside)
    if residual is not None:
        tl.store(total + row * width + column, values.to(total.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    dx,
    dweight,
    dbias,
    rows,
    width,
    dy_stride,
    dtotal_stride,
    x_stride,
    eps,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.full([1, BLOCK], 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, column < width, other=0.0).to(tl.float32)

    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    first = program * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        unit, inverse = unit_rows(
            load(x, x_stride, row, column, inside), inside, width, eps, CENTRED
        )
        gradient = load(dy, dy_stride, row, column, inside)
        weight_sum += gradient * unit
        bias_sum += gradient
        gradient *= scale
        result = gradient - unit * (tl.sum(gradient * unit, 1) / width)[:, None]
        if CENTRED:
            result -= (tl.sum(gradient, 1) / width)[:, None]
        result *= inverse
        if dtotal is not None:
            result += load(dtotal, dtotal_stride, row, column, inside)
        tl.store(dx + row * width + column, result.to(dx.dtype.element_ty), inside)
        first += tl.num_programs(0) * ROWS

    at = program * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    tl.store(dweight + at, tl.sum(weight_sum, 0), inside)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0), inside)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    parameters: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
    *,
    centred: bool,
) -> None:
    """y = norm(x), or y and total = norm(x + residual), x + residual; `parameters` weight, bias."""
    if x.numel() == 0:
        return
    x = rows_of(x)
    residual = None if residual is None else rows_of(residual)
    tile = tile_of_rows(x.shape[1])
    launch(
        forward_kernel,
        (triton.cdiv(x.shape[0], tile["ROWS"]),),
        *(x, residual, *map(packed, parameters), y, total, *x.shape),
        *(x.stride(0), 0 if residual is None else residual.stride(0), eps),
        CENTRED=centred,
        **tile,
    )


def packed(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """weight or bias with its elements side by side."""
    return None if parameter is None else parameter.contiguous()


def backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (..., C), dweight and (centred) dbias (C), float32: one pass gives all, needed or not.

    `x` is what was normalised; `dtotal`, where there is one, is added to its gradient.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    if x.numel() == 0:
        none = x.new_zeros(width, dtype=torch.float32)
        return dx, none, none
    x, dy = rows_of(x), rows_of(dy)
    dtotal = None if dtotal is None else rows_of(dtotal)
    tile = tile_of_rows(width)
    programs = min(PROGRAMS, triton.cdiv(x.shape[0], tile["ROWS"]))
    dweight = x.new_empty((programs, width), dtype=torch.float32)
    dbias = torch.empty_like(dweight) if centred else None
    launch(
        backward_kernel,
        (programs,),
        *(dy, dtotal, x, packed(weight), dx, dweight, dbias, *x.shape),
        *(dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0), eps),
        CENTRED=centred,
        **tile,
    )
    return dx, dweight.sum(0), dweight.new_empty(0) if dbias is None else dbias.sum(0)
