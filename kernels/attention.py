"""attention in Triton: the forward pass; attention_backward.py has the other.

As FlashAttention 2: a program keeps a tile of packed query rows (attention_scores.py) and walks
over blocks of keys with a running maximum and sum, in units of log2. Blocks that no row sees are
left out; only those at a boundary (causal, a window, the last keys) are masked, the others run
without a comparison. With few rows and many keys, programs share a sequence's keys: SPLIT keys
each, whatever the batch is; a second kernel adds up their parts in order. Bound by the tensor cores
at 4 T S D operations a head (2 T S D causal), in decoding by reading k and v once.

Registers a thread, of 255: BLOCK_M * BLOCK_D / threads for the result, BLOCK_M * BLOCK_N / threads
for the scores and half of that for the weights in a half type, BLOCK_M * BLOCK_D / 2 / threads for
q. Shared memory: stages * BLOCK_N * (D + Dv) elements for k and v.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import attention_scores as common
from .attention_scores import Extra, Operand, Shape
from .launch import factors, launch, precision, products, target

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
SPLIT = 256  # keys of a program in decoding
FEW_ROWS = 64  # up to so many packed rows count as decoding

# BLOCK_M, BLOCK_N, warps and stages for widths to 64 and to 128, where nothing spills inside of the
# loop. 32 rows a mma.sync warp: each fragment of k and v feeds 4 products, and the tensor cores are
# busy for longer than shared memory; with 16 rows a warp they are not. 3 stages are two buffers.
TILES = {
    "mma": ((128, 32, 4, 3), (128, 32, 4, 3)),
    "wgmma": ((128, 64, 4, 3), (128, 64, 8, 3)),
    "tcgen05": ((128, 64, 8, 3), (128, 64, 8, 3)),
    "mfma": ((128, 32, 4, 1), (128, 32, 4, 1)),
}


@triton.jit
def poison(
    result,
    v,
    at,
    head,
    query,
    begin,
    end,
    shape,
    extra,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Adds NaN and inf among values to the rows that attend to them, and to no other row.

    Key by key: rare, and must not cost the loop over blocks its registers.
    """
    for number in range(begin, end):
        key = number + tl.arange(0, 1)
        place, exists = common.place_keys(v, at, key, key < at.keys, shape)
        value = common.load_keys(place, exists, VALUE_WIDTH, BLOCK_DV, True).to(tl.float32)
        value = tl.where(common.is_finite(value), 0.0, value)
        inside = (query < at.rows) & (key < at.keys)[None, :]
        seen = common.visible(at, head, query, key[None, :], inside, extra)
        result = tl.where(seen, result + value, result)
    return result


@triton.jit
def own_part(blocks, SPLIT: tl.constexpr):
    """Of the blocks those of this program, which has SPLIT of a sequence's keys."""
    from_key = tl.program_id(1) * SPLIT
    begin = tl.maximum(blocks.begin, from_key)
    end = tl.minimum(blocks.end, from_key + SPLIT)
    full_begin = tl.minimum(tl.maximum(blocks.full_begin, begin), tl.maximum(end, begin))
    full_end = tl.maximum(tl.minimum(blocks.full_end, from_key + SPLIT), full_begin)
    return common.Blocks(begin, full_begin, full_end, end)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    y,
    lse,
    part,
    shape,
    extra,
    NEGATE: tl.constexpr,
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
    SPLIT: tl.constexpr,
):
    at, tile = common.place(shape, extra, BATCHES)
    row, query, head, blocks = common.query_tile(at, tile, extra, SHARE, BLOCK_M, BLOCK_N)
    if SPLIT > 0:
        blocks = own_part(blocks, SPLIT)

    q_tile = common.load_rows(q, at, row, SHARE, WIDTH, BLOCK_D, True).to(COMPUTE)
    if NEGATE:
        q_tile = -q_tile
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if extra.sinks is not None:
        sink = tl.load(extra.sinks + at.group * SHARE + row % SHARE).to(tl.float32)
        if SPLIT > 0:
            sink = tl.where(tl.program_id(1) == 0, sink, float("-inf"))
        peak = sink * 1.4426950408889634
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    poisoned = blocks.begin * 0

    for phase in tl.static_range(3):
        start, stop = common.part_of(blocks, phase)
        if (phase == 2) or (extra.mask is None and (phase == 1 or extra.left is not None)):
            for block in tl.range(start, stop, BLOCK_N):
                key = block + tl.arange(0, BLOCK_N)
                place, exists = common.place_keys(k, at, key, key < at.keys, shape)
                k_tile = common.load_keys(
                    place, exists, WIDTH, BLOCK_D, (phase != 1) or (shape.page_table is not None)
                ).to(COMPUTE)
                score = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                if extra.k_scale is not None:
                    place, _ = common.place_keys(extra.k_scale, at, key, exists, shape)
                    score *= tl.load(place, exists, other=0.0).to(tl.float32)[None, :]
                inside = (query < at.rows) & (key < at.keys)[None, :]
                score, _ = common.scores(score, at, head, query, key[None, :], inside, extra)
                if shape.page_table is not None:
                    score = tl.where(exists[None, :] | ~inside, score, float("nan"))
                if phase != 1:
                    seen = common.visible(at, head, query, key[None, :], inside, extra)
                    score = tl.where(seen, score, float("-inf"))

                higher = tl.maximum(peak, tl.max(score, 1) * extra.factor)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weight = tl.math.exp2(tl.fma(score, extra.factor, -base[:, None]))
                shrink = tl.math.exp2(peak - base)
                total = total * shrink + tl.sum(weight, 1)
                peak = higher
                if extra.kept is not None:
                    keep = common.kept(at, head, query, key[None, :], shape, extra, SHARE)
                    weight = tl.where(keep, weight * extra.kept, 0.0)
                if extra.v_scale is not None:
                    place, _ = common.place_keys(extra.v_scale, at, key, exists, shape)
                    weight *= tl.load(place, exists, other=0.0).to(tl.float32)[None, :]

                place, _ = common.place_keys(v, at, key, exists, shape)
                v_tile = common.load_keys(
                    place,
                    exists,
                    VALUE_WIDTH,
                    BLOCK_DV,
                    (phase != 1) or (shape.page_table is not None),
                ).to(COMPUTE)
                result *= shrink[:, None]
                if (phase != 1) and (extra.v_scale is None):
                    finite = common.is_finite(v_tile)
                    poisoned = tl.maximum(poisoned, tl.max(tl.max((~finite).to(tl.int32), 1), 0))
                    v_tile = tl.where(finite, v_tile, 0.0)
                result = tl.dot(weight.to(COMPUTE), v_tile, result, input_precision=PRECISION)

    if poisoned > 0:
        result = poison(
            *(result, v, at, head, query, blocks.begin, blocks.end, shape, extra),
            VALUE_WIDTH,
            BLOCK_DV,
        )
    inside = row < at.rows * SHARE
    column = tl.arange(0, BLOCK_DV)[None, :]
    stored = inside[:, None] & (column < VALUE_WIDTH)
    if SPLIT > 0:
        place = tl.program_id(1).to(tl.int64) * shape.batches + at.batch
        place = (place * shape.groups + at.group) * (at.rows * SHARE) + row
        tl.store(part.data + place[:, None] * VALUE_WIDTH + column, result, stored)
        tl.store(part.peak + place, peak, inside)
        tl.store(part.total + place, total, inside)
    else:
        finish(
            *(y, lse, at.batch, at.first_row, head, query),
            *(result, peak, total, inside, stored, column),
        )


@triton.jit
def log_sum(peak, total):
    """log(2^peak * total), rounded once: what it is off by, all weights of the backward pass are.

    total = 2^e * m with m near 1, whose logarithm is a polynomial (Cephes, logf).
    """
    bits = total.to(tl.int32, bitcast=True)
    e = (bits + 0x4AFB0D) >> 23  # 1.0 less sqrt(1/2), as bits: m is from there to sqrt(2)
    e -= 127
    x = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(tl.fma(x, 7.0376836292e-2, -1.1514610310e-1), x, 1.1676998740e-1)
    p = tl.fma(tl.fma(p, x, -1.2420140846e-1), x, 1.4249322787e-1)
    p = tl.fma(tl.fma(p, x, -1.6668057665e-1), x, 2.0000714765e-1)
    p = tl.fma(tl.fma(p, x, -2.4999993993e-1), x, 3.3333331174e-1)
    log = x + (p * x * (x * x) - 0.5 * (x * x))
    whole = peak + e.to(tl.float32)
    lost = e.to(tl.float32) - (whole - peak)
    rest = tl.fma(lost, LN2, whole * -1.904654323148236e-09)  # log(2) less its float32
    result = tl.fma(whole, LN2, log + rest)
    return tl.where(total - total == 0.0, result, peak + total)


@triton.jit
def finish(y, lse, batch, first_row, head, query, result, peak, total, inside, stored, column):
    """Stores y and lse of rows with their sums; a row without keys is 0."""
    nothing = total == 0.0
    result = result / tl.where(nothing, 1.0, total)[:, None]
    at = batch * y.batch + head.to(tl.int64) * y.head + (first_row + query) * y.row
    tl.store(y.data + at + column, result.to(y.data.dtype.element_ty), stored)
    value = tl.where(nothing, float("-inf"), log_sum(peak, total))
    at = batch * lse.batch + head.to(tl.int64) * lse.head + (first_row + query) * lse.row
    tl.store(lse.data + at, value[:, None], inside[:, None])


@triton.jit
def combine_kernel(
    part,
    y,
    lse,
    shape,
    splits,
    SHARE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds up the parts of a few packed rows, in the order of their keys."""
    index = tl.program_id(0) // shape.tiles
    batch = (index // shape.groups).to(tl.int64)
    row = (tl.program_id(0) % shape.tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < shape.rows * SHARE
    column = tl.arange(0, BLOCK_DV)[None, :]
    stored = inside[:, None] & (column < VALUE_WIDTH)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(splits):
        place = (split * shape.batches * shape.groups + index).to(tl.int64)
        place = place * (shape.rows * SHARE) + row
        other_peak = tl.load(part.peak + place, inside, other=float("-inf"))
        other_total = tl.load(part.total + place, inside, other=0.0)
        other = tl.load(part.data + place[:, None] * VALUE_WIDTH + column, stored, other=0.0)

        higher = tl.maximum(peak, other_peak)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mine, theirs = tl.math.exp2(peak - base), tl.math.exp2(other_peak - base)
        total = total * mine + other_total * theirs
        result = result * mine[:, None] + other * theirs[:, None]
        peak = higher

    query = (row // SHARE)[:, None]
    head = ((index % shape.groups) * SHARE + row % SHARE)[:, None]
    finish(y, lse, batch, batch * 0, head, query, result, peak, total, inside, stored, column)


class Part(NamedTuple):
    """Sums that programs leave for combine_kernel, (splits, B, G, T * SHARE, Dv) and without Dv."""

    data: Any
    peak: Any
    total: Any


def operand(x: torch.Tensor | None) -> Operand | None:
    """(B, H, T, ...) as the kernels take it."""
    return None if x is None else Operand(x, *x.stride()[:3])


def packed_operand(x: torch.Tensor | None) -> Operand | None:
    """(T, H, ...) of packed sequences as the kernels take it."""
    return None if x is None else Operand(x, 0, x.stride(1), x.stride(0))


def statistic(x: torch.Tensor) -> Operand:
    """(B, H, T), or (H, T) of packed sequences, as the kernels take it."""
    return Operand(x, *x.stride()) if x.ndim == 3 else Operand(x, 0, *x.stride())


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, bool]:
    """q, a scale above 0, and whether the kernel must negate q: a maximum of scores is then one of
    scaled scores. Without a scale all scores are 0, or NaN."""
    return (q * 0.0, 1.0, False) if scale == 0 else (q, abs(scale), scale < 0)


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last axis side by side, as it is wherever possible."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def window_of(options: Any) -> tuple[int | None, int | None]:
    """left, right; causal is a right side of 0 at most."""
    left, right = options.window or (None, None)
    if options.causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def signed(bits: int) -> int:
    """The int32 with the same bits as an uint32."""
    return bits - 2**32 if bits >= 2**31 else bits


def extra_of(q: torch.Tensor, keys: int, extra: Any, options: Any, scale: float) -> Extra:
    """The kernels' options of a call of q (B, H, T, D) with so many keys; `extra` may be None."""
    left, right = window_of(options)
    given: dict[str, Any] = dict.fromkeys(Extra._fields)
    given |= {"scale": scale, "softcap": options.softcap, "left": left, "right": right}
    transformed = options.softcap is not None
    if extra is not None:
        transformed |= extra.alibi_slopes is not None
        transformed |= extra.mask is not None and extra.mask.is_floating_point()
        given |= tensors_of(q, keys, extra)
        if extra.seed is not None:
            seed = int(extra.seed)
            given |= {
                "seed_low": signed(seed & 0xFFFFFFFF),
                "seed_high": signed(seed >> 32),
                "threshold": signed(int(options.dropout_p * 2**32)),
                "kept": 1 / (1 - options.dropout_p),
            }
    return Extra(**{**given, "factor": LOG2E if transformed else scale * LOG2E})


def tensors_of(q: torch.Tensor, keys: int, extra: Any) -> dict[str, Any]:
    """The fields of Extra that come from tensors."""
    is_tensor = isinstance(extra.q_offset, torch.Tensor)
    given = {
        "lengths": None if extra.kv_lengths is None else extra.kv_lengths.contiguous(),
        "offsets": extra.q_offset.contiguous() if is_tensor else None,
        "offset": None if is_tensor else extra.q_offset,
        "sinks": None if extra.sinks is None else extra.sinks.contiguous(),
        "k_scale": operand(extra.k_scale),
        "v_scale": operand(extra.v_scale),
    }
    if extra.alibi_slopes is not None:
        slopes = extra.alibi_slopes.expand(q.shape[:2])
        given |= {"slopes": slopes}
        given |= dict(zip(("slopes_batch", "slopes_head"), slopes.stride(), strict=True))
    if extra.mask is not None:
        mask = extra.mask.expand(*q.shape[:3], keys)
        given |= {"mask": mask.view(torch.uint8) if mask.dtype == torch.bool else mask}
        names = ("mask_batch", "mask_head", "mask_row", "mask_key")
        given |= dict(zip(names, mask.stride(), strict=True))
    return given


def forward_tiles(q: torch.Tensor, value_width: int, rows: int, compute: torch.dtype) -> dict:
    """BLOCK_M, BLOCK_N, warps and stages by registers and shared memory, pruned by the rows."""
    width = max(q.shape[-1], value_width)
    if compute == torch.float32:  # products without tensor cores hold both factors in registers
        tiles = (64, 32, 4, 2) if width <= 64 else (32, 32, 4, 2)
    elif width <= 128:
        tiles = TILES[products()][width > 64]
    else:
        tiles = (64, 32, 8, 2)
    if target().backend == "hip":  # 64 KiB of shared memory
        tiles = (*tiles[:3], 1)
    block_m = min(tiles[0], max(16, triton.next_power_of_2(rows)))
    warps = tiles[2] if block_m == tiles[0] else 4
    return {"BLOCK_M": block_m, "BLOCK_N": tiles[1], "num_warps": warps, "num_stages": tiles[3]}


def widths(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """The kernels' constants of D and Dv."""
    width, value_width = q.shape[-1], v.shape[-1]
    return {
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_width)),
    }


def constants(q: torch.Tensor, k: torch.Tensor, compute: torch.dtype) -> dict[str, Any]:
    """The kernels' constants of dtypes and heads, axis 1 of both (of k's pages, too)."""
    return {
        "COMPUTE": getattr(tl, str(compute).removeprefix("torch.")),
        "PRECISION": precision(compute) if k.dtype == q.dtype else "ieee",
        "SHARE": q.shape[1] // k.shape[1],
    }


def run(
    operands: tuple[Operand, ...],
    shape: Shape,
    extra: Extra,
    results: tuple[torch.Tensor, Operand, Operand],
    meta: dict[str, Any],
) -> None:
    """Launches the forward kernel for q, k, v; y's storage, y and lse as operands in `results`."""
    y, *outs = results
    rows = shape.rows * meta["SHARE"]
    shared = rows <= FEW_ROWS and shape.keys > SPLIT and shape.ends_q is None
    splits = triton.cdiv(shape.keys, SPLIT) if shared else 1
    grid = shape.tiles * shape.groups * (1 if shape.ends_q is not None else shape.batches)
    part = None
    if splits > 1:
        sizes = (splits, shape.batches, shape.groups, rows)
        sums = [y.new_empty(s, dtype=torch.float32) for s in ((*sizes, y.shape[-1]), sizes, sizes)]
        part = Part(*sums)
    launch(
        forward_kernel,
        (grid, splits),
        *(*operands, *outs, part, shape, extra),
        SPLIT=SPLIT if splits > 1 else 0,
        **meta,
    )
    if part is not None:
        block = min(16, triton.next_power_of_2(rows))
        shape = shape._replace(tiles=triton.cdiv(rows, block))
        launch(
            combine_kernel,
            (shape.tiles * shape.groups * shape.batches,),
            *(part, *outs, shape, splits),
            **{name: meta[name] for name in ("SHARE", "VALUE_WIDTH", "BLOCK_DV")},
            BLOCK_M=block,
            num_warps=4,
        )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: Any,
    options: Any,
    *,
    keys: int | None = None,
    place: dict[str, Any] | None = None,
) -> Any:
    """y (B, H, T, Dv), and lse (B, H, T) with options.return_lse.

    For keys in pages `keys` is the most that a sequence may have, `place` Shape's fields of pages.
    """
    batch, heads, rows, _ = q.shape
    groups = k.shape[1]
    keys = k.shape[2] if keys is None else keys
    y = q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel():
        q, scale, negate = positive_scale(q, options.scale)
        q, k, v = by_rows(q), by_rows(k), by_rows(v)
        compute, share = factors(q, k), heads // groups
        tiles = forward_tiles(q, v.shape[3], rows * share, compute)
        count = triton.cdiv(rows * share, tiles["BLOCK_M"])
        run(
            (operand(q), operand(k), operand(v)),
            Shape(rows, keys, batch, groups, count, **(place or {})),
            extra_of(q, keys, extra, options, scale),
            (y, operand(y), operand(lse)),
            {
                **constants(q, k, compute),
                **widths(q, v),
                **tiles,
                "BATCHES": 1,
                "NEGATE": negate,
            },
        )
    return (y, lse) if options.return_lse else y


def backward(*args: Any) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv, dsinks and None twice; attention_backward.py has the kernels."""
    from . import attention_backward

    return attention_backward.backward(*args)
