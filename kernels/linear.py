"""linear in Triton with a weight in int8 or int4, for few rows: decoding.

x is rounded to int8 by groups (quantize_kernel), as the contract says; then a program has a few
panels of 16 outputs and a part of the groups of K, multiplies integers in the tensor cores,
exactly, and adds the groups up in float32. A panel's bytes for a group lie one behind the other,
and each is read once: 1 byte (int8) or half a byte (int4) a weight, 2 operations a row. Bound by
reading the weight. How K is parted follows from the weight's shape alone, and parts are added in
order: a row's bits depend neither on the other rows nor on the run.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import launch

PANEL = 16  # outputs whose bytes lie side by side
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors: K is parted to have so many
LEAST_GROUPS = 4  # of a part of K


@triton.jit
def quantize_kernel(x, q, steps, sums, width, x_stride, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """q, steps and sums of q of a few groups of one row: x = q * step."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < width // GROUP
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + row * x_stride + column, inside[:, None], other=0.0).to(tl.float32)

    peak = tl.max(tl.abs(values), 1)
    small = peak < 7.888609052210118e-31  # 2^-100: counts as zeros
    inverse = tl.where(small, 0.0, tl.math.div_rn(127.0, tl.where(small, 1.0, peak)))
    scaled = values * inverse[:, None]
    # To the nearest, ties to even: what float32 does where its steps are 1.
    whole = (scaled + 12582912.0) - 12582912.0
    broken = tl.sum((values - values != 0.0).to(tl.int32), 1) > 0  # NaN or inf: so is all of y
    step = tl.where(broken, float("nan"), peak * 0.007874015748031496)
    integers = tl.where(broken[:, None], 0.0, whole).to(tl.int8)

    at = row * (width // GROUP) + group
    tl.store(q + row * width + column, integers, inside[:, None])
    tl.store(steps + at, step, inside)
    tl.store(sums + at, tl.sum(integers.to(tl.int32), 1), inside)


@triton.jit
def weight_tile(
    values, panel, group, groups, GROUP: tl.constexpr, PANELS: tl.constexpr, BITS: tl.constexpr
):
    """A group of the outputs of some panels, (GROUP, PANELS * 16), unsigned in int32."""
    BYTES: tl.constexpr = GROUP * 16 * BITS // 8
    start = (panel.to(tl.int64) * groups + group) * BYTES
    raw = tl.load(values + start[:, None] + tl.arange(0, BYTES)[None, :]).to(tl.int32)
    if BITS == 8:
        quads = tl.reshape(raw, (PANELS, GROUP // 4, 16, 4))
        tile = tl.permute(quads, (1, 3, 0, 2))
    else:
        halves = tl.join(raw & 15, raw >> 4)
        quads = tl.reshape(halves, (PANELS, GROUP // 8, 16, 4, 2))
        tile = tl.permute(quads, (4, 1, 3, 0, 2))
    return tl.reshape(tile, (GROUP, PANELS * 16))


@triton.jit
def columns_of_a_group(GROUP: tl.constexpr, BITS: tl.constexpr):
    """Which column of a group each row of weight_tile belongs to.

    Of int4, first those of the lower halves of bytes: so both halves of a byte are of one thread.
    """
    column = tl.arange(0, GROUP)
    if BITS == 4:
        HALF: tl.constexpr = GROUP // 2
        rest = column % HALF
        column = rest // 4 * 8 + column // HALF * 4 + rest % 4
        column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
    return column


@triton.jit
def product_kernel(
    q,
    steps,
    sums,
    values,
    scales,
    minimums,
    bias,
    y,
    rows,
    outputs,
    groups,
    part_groups,
    y_stride,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PANELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)
    panel = tl.program_id(0) * PANELS + tl.arange(0, PANELS)
    last_panel = tl.cdiv(outputs, 16) - 1
    panel = tl.minimum(panel, last_panel)  # those beyond compute what nobody stores
    first = tl.program_id(1) * part_groups
    total = tl.zeros([BLOCK_M, PANELS * 16], tl.float32)
    column = columns_of_a_group(GROUP, BITS)
    for group in tl.range(first, tl.minimum(first + part_groups, groups)):
        weight = weight_tile(values, panel, group, groups, GROUP, PANELS, BITS) - ZERO
        at = row.to(tl.int64)[:, None] * (groups * GROUP) + group * GROUP + column[None, :]
        x_tile = tl.load(q + at, (row < rows)[:, None], other=0)
        if GROUP < 32:  # less than the tensor cores' integers take; the same whole numbers
            product = tl.dot(x_tile.to(tl.float16), weight.to(tl.float16))
        else:
            product = tl.dot(x_tile, weight.to(tl.int8)).to(tl.float32)
        at = (panel.to(tl.int64) * groups + group)[:, None] * 16 + tl.arange(0, 16)[None, :]
        scale = tl.reshape(tl.load(scales + at).to(tl.float32), (1, PANELS * 16))
        product *= scale
        at_row = row.to(tl.int64) * groups + group
        if minimums is not None:
            minimum = tl.reshape(tl.load(minimums + at).to(tl.float32), (1, PANELS * 16))
            product += tl.load(sums + at_row, row < rows, other=0).to(tl.float32)[:, None] * minimum
        total += product * tl.load(steps + at_row, row < rows, other=0.0)[:, None]

    column = tl.program_id(0) * (PANELS * 16) + tl.arange(0, PANELS * 16)
    if bias is not None:
        total += tl.load(bias + column, column < outputs, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * y_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), inside)


@triton.jit
def add_kernel(parts, bias, y, parts_count, size, outputs, BLOCK: tl.constexpr):
    """y (rows, outputs) = the sum of its parts in order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    place = parts + at
    for _ in range(parts_count):
        total += tl.load(place, inside, other=0.0)
        place += size
    if bias is not None:
        total += tl.load(bias + at % outputs, inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), inside)


def quantized(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (rows, K) int8, steps (float32) and sums of q (int32), both (rows, K / group)."""
    rows, width = x.shape
    q = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    steps = x.new_empty((rows, width // group), dtype=torch.float32)
    sums = torch.empty_like(steps, dtype=torch.int32)
    groups = max(1024 // group, 1)
    launch(
        quantize_kernel,
        (rows, triton.cdiv(width // group, groups)),
        *(x, q, steps, sums, width, x.stride(0)),
        GROUP=group,
        GROUPS=groups,
        num_warps=2,
    )
    return q, steps, sums


def into(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out (..., N) = x @ weight.T + bias, contiguous; `weight` a PackedWeight of integers."""
    outputs, width = weight.shape
    if out.numel() == 0:
        return
    x = x.reshape(out.numel() // outputs, width)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, group, groups = x.shape[0], weight.group, width // weight.group
    bits = 8 if weight.format == "int8" else 4
    panels = 4 if bits == 8 else 8
    programs = triton.cdiv(outputs, panels * PANEL)
    parts = max(min(PROGRAMS // programs, groups // LEAST_GROUPS), 1)
    part_groups = triton.cdiv(groups, parts)
    parts = triton.cdiv(groups, part_groups)
    bias = None if bias is None else bias.contiguous()
    y = out if parts == 1 else x.new_empty((parts, rows, outputs), dtype=torch.float32)
    launch(
        product_kernel,
        (programs, parts),
        *(*quantized(x, group), weight.values, weight.scales, weight.minimums),
        *(bias if parts == 1 else None, y, rows, outputs, groups, part_groups, outputs),
        ZERO=0 if weight.minimums is not None else 1 << (bits - 1),
        BITS=bits,
        GROUP=group,
        PANELS=panels,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        num_warps=4,
        num_stages=4,
    )
    if parts > 1:
        size = rows * outputs
        args = (y, bias, out, parts, size, outputs)
        launch(add_kernel, (triton.cdiv(size, 1024),), *args, BLOCK=1024, num_warps=4)


def forward(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, (..., N) in x's dtype."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    into(x, weight, bias, out)
    return out


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *needs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx and dbias (float32), by the GPU's library; a PackedWeight has no gradient."""
    need_dx, _, need_dbias = needs
    rows = dy.reshape(-1, dy.shape[-1])
    return (
        dy @ weight if need_dx else x.new_empty(0),
        weight.new_empty(0),
        rows.sum(0, dtype=torch.float32) if need_dbias else dy.new_empty(0, dtype=torch.float32),
    )
