"""attention in Triton: the backward pass, in three kernels without atomics.

delta_kernel: a row's dy . y, less the gradient of its lse. key_kernel: a program keeps a tile of
keys and values and walks over the packed query rows that see it, for dk and dv; the heads of a
group are rows like others, so their sum is the program's own. query_kernel: a program keeps a tile
of rows and walks over keys, as forward does, for dq. The weights are computed again in both, from
lse: 7 products of 2 T S D operations where the least is 5, for the same bits on every run.

A tile's second operand is loaded where its product stands, not at the top of the loop: there the
compiler holds all fragments at once, and spills. Scores turned around, so that warps share both
directions of a tile, were tried on sm_80: the compiler repeats products (1.5 to 1.7 times those by
hand) and spills 120 to 370 times in a turn.

Registers a thread, of 255: key_kernel BLOCK_N * (BLOCK_D + BLOCK_DV) / threads for dk and dv, and
BLOCK_M * BLOCK_N / threads each for the scores and for their gradient; query_kernel BLOCK_M *
BLOCK_D / threads, and the same two.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import attention_scores as common
from .attention import (
    by_rows,
    constants,
    extra_of,
    operand,
    statistic,
    widths,
)
from .attention_scores import Extra, Operand, Shape
from .launch import factors, launch, products, target

# BLOCK_M, BLOCK_N, warps and stages of key_kernel and of query_kernel, for widths to 64 and to 128,
# where nothing spills in the loop over blocks without a mask. With 3 stages one block is copied
# while another is multiplied; with 2 there is one buffer, and another program must fill in. A warp
# group of wgmma takes 64 rows: with fewer for each it would repeat another one's products.
TILES = {
    "mma": (
        ((32, 128, 4, 3), (128, 64, 8, 3)),
        ((64, 64, 4, 2), (128, 16, 4, 3)),
    ),
    "wgmma": (
        ((64, 128, 8, 2), (128, 64, 8, 2)),
        ((32, 128, 8, 2), (128, 64, 8, 2)),
    ),
    "tcgen05": (
        ((64, 128, 8, 2), (128, 64, 8, 2)),
        ((64, 64, 8, 2), (64, 64, 8, 2)),
    ),
    "mfma": (
        ((16, 64, 4, 1), (128, 32, 4, 1)),
        ((16, 64, 4, 1), (64, 16, 4, 1)),
    ),
}
PACKED_TILES = {
    **TILES,
    "mma": (
        ((32, 128, 8, 3), (128, 64, 8, 3)),
        ((32, 64, 4, 2), (128, 16, 4, 3)),
    ),
}


@triton.jit
def delta_kernel(
    dy,
    y,
    dlse,
    delta,
    rows,
    heads,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    index = tl.program_id(0) // blocks
    batch, head = (index // heads).to(tl.int64), (index % heads).to(tl.int64)
    row = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)
    start = dy.data + batch * dy.batch + head * dy.head
    left = tl.load(start + row[:, None] * dy.row + column, inside, other=0.0).to(tl.float32)
    start = y.data + batch * y.batch + head * y.head
    right = tl.load(start + row[:, None] * y.row + column, inside, other=0.0).to(tl.float32)

    total = tl.sum(left * right, 1)
    if dlse is not None:
        at = batch * dlse.batch + head * dlse.head + row * dlse.row
        total -= tl.load(dlse.data + at, row < rows, other=0.0)

    at = batch * delta.batch + head * delta.head + row * delta.row
    tl.store(delta.data + at, total, row < rows)


@triton.jit
def load_statistics(lse, delta, at, row, SHARE: tl.constexpr):
    """lse in units of log2 as high + log2(1 / power), and delta; of existing rows.

    In float32 a weight 2^(s - lse) would lose the bits that a difference of large numbers has not:
    so lse's whole part, where it is moderate, and what `high` lacks, are in a factor beside.
    A row that attends to nothing, or is none, counts as having an infinite sum: its weights are 0.
    """
    inside = row < at.rows * SHARE
    head = (at.group * SHARE + row % SHARE).to(tl.int64)
    query = at.first_row + row // SHARE
    place = at.batch * lse.batch + head * lse.head + query * lse.row
    value = tl.load(lse.data + place, inside, other=float("inf"))
    value = tl.where(value == float("-inf"), float("inf"), value)
    high = value * 1.4426950408889634
    # What the product lost, and what float32 lacks of log2(e).
    low = tl.fma(value, 1.4426950408889634, -high) + value * 1.925963033500996e-08
    low = tl.where(value == float("inf"), 0.0, low)
    whole = tl.where(tl.abs(high) < 64.0, tl.floor(high), 0.0)
    place = at.batch * delta.batch + head * delta.head + query * delta.row
    power = tl.math.exp2(-whole) * tl.math.exp2(-low)  # their sum would lose low
    return high - whole, power, tl.load(delta.data + place, inside, other=0.0)


@triton.jit
def weights_of(
    product,
    high_part,
    power,
    at,
    head,
    query,
    key,
    shape,
    extra,
    SHARE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile's weights and the slope of their scores, of `product` = q . k; which of them are seen
    (the others are 0), and which dropout keeps.

    Statistics broadcast to the tile.
    """
    inside = (query < at.rows) & (key < at.keys)
    score, slope = common.scores(product, at, head, query, key, inside, extra)
    weight = tl.math.exp2(tl.fma(score, extra.factor, -high_part)) * power
    seen = inside
    if MASKED:
        seen = common.visible(at, head, query, key, inside, extra)
        weight = tl.where(seen, weight, 0.0)
    keep = inside
    if extra.kept is not None:
        keep = common.kept(at, head, query, key, shape, extra, SHARE)
    return weight, slope, seen, keep


@triton.jit
def used_of(weight, keep, extra):
    """The weights as they met v."""
    if extra.kept is not None:
        weight = tl.where(keep, weight * extra.kept, 0.0)
    return weight


@triton.jit
def gradient_of(weight, slope, seen, keep, dproduct, delta, extra, MASKED: tl.constexpr):
    """The gradient of q . k but for the scale, of `dproduct` = dy . v."""
    if extra.kept is not None:
        dproduct = tl.where(keep, dproduct * extra.kept, 0.0)
    gradient = weight * (dproduct - delta) * slope
    if MASKED:
        gradient = tl.where(seen, gradient, 0.0)
    return gradient


@triton.jit
def key_kernel(
    q,
    k,
    v,
    dy,
    lse,
    delta,
    dk,
    dv,
    shape,
    extra,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCHES: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    at, tile = common.place(shape, extra, BATCHES)
    key_row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key = key_row[:, None]
    blocks = rows_that_see(at, tile, extra, SHARE, BLOCK_M, BLOCK_N)
    k_tile = common.load_key_rows(k, at, key_row, WIDTH, BLOCK_D, True).to(COMPUTE)
    v_tile = common.load_key_rows(v, at, key_row, VALUE_WIDTH, BLOCK_DV, True).to(COMPUTE)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for phase in tl.static_range(3):
        start, stop = common.part_of(blocks, phase)
        if (phase == 2) or (extra.mask is None and (phase == 1 or extra.right is not None)):
            for block in tl.range(start, stop, BLOCK_M):
                row = block + tl.arange(0, BLOCK_M)
                query = (row // SHARE)[None, :]
                head = (at.group * SHARE + row % SHARE)[None, :]
                q_tile = common.load_rows(q, at, row, SHARE, WIDTH, BLOCK_D, phase != 1).to(COMPUTE)
                high_part, power, row_delta = load_statistics(lse, delta, at, row, SHARE)
                weight, slope, seen, keep = weights_of(
                    tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION),
                    *(high_part[None, :], power[None, :]),
                    *(at, head, query, key, shape, extra, SHARE, phase != 1),
                )
                dy_tile = common.load_rows(
                    dy, at, row, SHARE, VALUE_WIDTH, BLOCK_DV, phase != 1
                ).to(COMPUTE)
                gradient = gradient_of(
                    *(weight, slope, seen, keep),
                    tl.dot(v_tile, tl.trans(dy_tile), input_precision=PRECISION),
                    *(row_delta[None, :], extra, phase != 1),
                )
                weight = used_of(weight, keep, extra)
                dv_tile = tl.dot(weight.to(COMPUTE), dy_tile, dv_tile, input_precision=PRECISION)
                if phase != 1:
                    q_tile = tl.where(common.is_finite(q_tile), q_tile, 0.0)
                dk_tile = tl.dot(gradient.to(COMPUTE), q_tile, dk_tile, input_precision=PRECISION)

    store_keys(dk, dk_tile * extra.scale, at, key, shape, WIDTH, BLOCK_D)
    store_keys(dv, dv_tile, at, key, shape, VALUE_WIDTH, BLOCK_DV)


@triton.jit
def rows_that_see(
    at, tile, extra, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The blocks of packed rows for a tile of keys; none where the tile is past the last key."""
    first = tile * BLOCK_N
    blocks = common.rows_of_keys(first, first + BLOCK_N - 1, at, extra, SHARE, BLOCK_M)
    end = tl.where(first < at.keys, blocks.end, blocks.begin)
    full_begin = tl.minimum(blocks.full_begin, tl.maximum(end, blocks.begin))
    full_end = tl.minimum(blocks.full_end, tl.maximum(end, full_begin))
    return common.Blocks(blocks.begin, full_begin, full_end, end)


@triton.jit
def store_keys(operand, tile, at, key, shape, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """dk or dv of a tile of keys: those past kv_lengths are zeros, those of packed sequences the
    next one's."""
    last = at.keys
    if shape.ends_k is None:
        last = at.keys * 0 + shape.keys
    column = tl.arange(0, BLOCK)[None, :]
    place = at.batch * operand.batch + at.group.to(tl.int64) * operand.head
    place += (at.first_key + key) * operand.row
    tile = tl.where(key < at.keys, tile, 0.0).to(operand.data.dtype.element_ty)
    tl.store(operand.data + place + column, tile, (key < last) & (column < WIDTH))


@triton.jit
def query_kernel(
    q,
    k,
    v,
    dy,
    lse,
    delta,
    dq,
    shape,
    extra,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCHES: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    at, tile = common.place(shape, extra, BATCHES)
    row, query, head, blocks = common.query_tile(at, tile, extra, SHARE, BLOCK_M, BLOCK_N)
    q_tile = common.load_rows(q, at, row, SHARE, WIDTH, BLOCK_D, True).to(COMPUTE)
    dy_tile = common.load_rows(dy, at, row, SHARE, VALUE_WIDTH, BLOCK_DV, True).to(COMPUTE)
    high_part, power, row_delta = load_statistics(lse, delta, at, row, SHARE)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for phase in tl.static_range(3):
        start, stop = common.part_of(blocks, phase)
        if (phase == 2) or (extra.mask is None and (phase == 1 or extra.left is not None)):
            for block in tl.range(start, stop, BLOCK_N):
                key_row = block + tl.arange(0, BLOCK_N)
                k_tile = common.load_key_rows(k, at, key_row, WIDTH, BLOCK_D, phase != 1).to(
                    COMPUTE
                )
                key = key_row[None, :]
                weight, slope, seen, keep = weights_of(
                    tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION),
                    *(high_part[:, None], power[:, None]),
                    *(at, head, query, key, shape, extra, SHARE, phase != 1),
                )
                v_tile = common.load_key_rows(v, at, key_row, VALUE_WIDTH, BLOCK_DV, phase != 1).to(
                    COMPUTE
                )
                gradient = gradient_of(
                    *(weight, slope, seen, keep),
                    tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION),
                    *(row_delta[:, None], extra, phase != 1),
                )
                if phase != 1:
                    k_tile = tl.where(common.is_finite(k_tile), k_tile, 0.0)
                dq_tile = tl.dot(gradient.to(COMPUTE), k_tile, dq_tile, input_precision=PRECISION)

    column = tl.arange(0, BLOCK_D)[None, :]
    place = at.batch * dq.batch + head.to(tl.int64) * dq.head + (at.first_row + query) * dq.row
    inside = (row[:, None] < at.rows * SHARE) & (column < WIDTH)
    dq_tile *= extra.scale
    tl.store(dq.data + place + column, dq_tile.to(dq.data.dtype.element_ty), inside)


def tiles_of(
    q: torch.Tensor, value_width: int, compute: torch.dtype, *, packed: bool = False
) -> tuple[dict, dict]:
    """BLOCK_M, BLOCK_N, warps and stages of key_kernel and of query_kernel."""
    width = max(q.shape[-1], value_width)
    if compute == torch.float32:  # products without tensor cores hold both factors in registers
        tiles = ((32, 32, 4, 1), (32, 32, 4, 1))
    elif width <= 128:
        tiles = (PACKED_TILES if packed else TILES)[products()][width > 64]
    else:
        tiles = ((32, 64, 8, 1), (64, 32, 8, 1))
    stages = (1, 1) if target().backend == "hip" else (tiles[0][3], tiles[1][3])
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    key, query = (
        dict(zip(names, (*t[:3], s), strict=True)) for t, s in zip(tiles, stages, strict=True)
    )
    return key, query


def delta_of(
    dy: torch.Tensor, y: torch.Tensor, dlse: torch.Tensor | None, operands: Any
) -> torch.Tensor:
    """dy . y - dlse in float32, of the shape of dlse; `operands` makes them of tensors.

    dy and y (B, H, T, Dv), or (T, H, Dv) of packed sequences.
    """
    packed = dy.ndim == 3
    rows, heads = (dy.shape[0], dy.shape[1]) if packed else (dy.shape[2], dy.shape[1])
    shape = (heads, rows) if packed else (dy.shape[0], heads, rows)
    delta = dy.new_empty(shape, dtype=torch.float32)
    width = dy.shape[-1]
    block = max(16, triton.next_power_of_2(width))
    tile_rows = max(1, 2048 // block)
    launch(
        delta_kernel,
        ((1 if packed else dy.shape[0]) * heads * triton.cdiv(rows, tile_rows),),
        *(operands(dy), operands(y)),
        None if dlse is None else statistic(dlse),
        *(statistic(delta), rows, heads),
        WIDTH=width,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=4,
    )
    return delta


def run(
    operands: tuple[Operand, ...],
    results: tuple[Operand, ...],
    shape: Shape,
    extra: Extra,
    meta: dict[str, Any],
    tiles: tuple[dict, dict],
    programs: tuple[tuple[int, Any, int], tuple[int, Any, int]],
) -> None:
    """Launches both kernels; `programs` are their tiles, tile_ends and number, key_kernel's first.

    operands: q, k, v, dy, lse, delta; results: dq, dk, dv.
    """
    dq, dk, dv = results
    for kernel, outs, tile, (count, ends, grid) in zip(
        (key_kernel, query_kernel), ((dk, dv), (dq,)), tiles, programs, strict=True
    ):
        placed = shape._replace(tiles=count, tile_ends=ends)
        launch(kernel, (grid,), *operands, *outs, placed, extra, **meta, **tile)


def backward(
    dy: torch.Tensor,
    dlse: torch.Tensor | None,
    y: torch.Tensor,
    lse: torch.Tensor,
    need_dmask: bool,
    need_dslopes: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: Any,
    options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv, dsinks (float32), and None for the mask and the slopes."""
    batch, heads, rows, _ = q.shape
    groups, keys = k.shape[1:3]
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    sinks = extra.sinks
    if lse.numel() == 0 or keys == 0:
        none = None if sinks is None else sinks.new_zeros(heads, dtype=torch.float32)
        return dq, dk, dv, none, None, None
    q, k, v, dy, y = map(by_rows, (q, k, v, dy, y))
    delta = delta_of(dy, y, dlse, operand)
    compute, share = factors(q, k), heads // groups
    key_tiles, query_tiles = tiles_of(q, v.shape[3], compute)
    counts = (
        triton.cdiv(keys, key_tiles["BLOCK_N"]),
        triton.cdiv(rows * share, query_tiles["BLOCK_M"]),
    )
    run(
        (*map(operand, (q, k, v, dy)), statistic(lse), statistic(delta)),
        tuple(map(operand, (dq, dk, dv))),
        Shape(rows, keys, batch, groups, 0),
        extra_of(q, keys, extra, options, options.scale),
        {**constants(q, k, compute), **widths(q, v), "BATCHES": 1},
        (key_tiles, query_tiles),
        tuple((count, None, count * batch * groups) for count in counts),
    )
    return dq, dk, dv, None if sinks is None else gradient_of_sinks(sinks, lse, delta), None, None


def gradient_of_sinks(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """(H), float32: a sink takes its share of each row's sum and gives nothing to y."""
    share = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -math.inf, 0.0)
    return -(share * delta).sum((0, 2))
