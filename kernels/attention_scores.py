"""What attention's Triton kernels share: where a program's rows and keys are, and their scores.

The query heads of one key/value head are packed: row r of a sequence is the query r // SHARE of the
group's head r % SHARE. So keys and values are read once for all of them, a decoding step fills a
tile with heads, and dk and dv are sums within one program.

Tiles are (rows, keys) or (keys, rows): functions take `query`, `head` and `key` as they broadcast.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """A tensor (B, H, T, D), packed sequences (T, H, D) or pages, by strides; D is contiguous."""

    data: Any
    batch: int
    head: int
    row: int


class Shape(NamedTuple):
    """The sizes of a call.

    rows, keys: T, S; groups: G; tiles: a sequence's, or of all packed ones together.
    tile_ends (B): where each packed sequence's tiles end; ends_q, ends_k (B + 1): its rows.
    pages: how many; page_table (B, M) with its stride; page_length: places of a page.
    """

    rows: int
    keys: int
    batches: int
    groups: int
    tiles: int
    tile_ends: Any = None
    ends_q: Any = None
    ends_k: Any = None
    pages: Any = None
    page_table: Any = None
    table_stride: Any = None
    page_length: Any = None


class Extra(NamedTuple):
    """The options of a call; None where there is none.

    factor: what a score is multiplied by for exp2. With softcap, slopes or a float mask (`scores`)
    that is log2(e), and `scale` was applied before.
    left, right: the window's sides, right being 0 at most with causal.
    seed_low, seed_high, threshold, kept: dropout's seed, the hash from which on a weight is kept,
    all three as int32 with the same bits, and what a kept weight is multiplied by.
    """

    factor: float
    scale: float
    softcap: Any
    left: Any
    right: Any
    offset: Any
    offsets: Any
    lengths: Any
    sinks: Any
    slopes: Any
    slopes_batch: Any
    slopes_head: Any
    mask: Any
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_key: Any
    seed_low: Any
    seed_high: Any
    threshold: Any
    kept: Any
    k_scale: Any
    v_scale: Any


class Place(NamedTuple):
    """The sequence and the key/value head of a program.

    first_row, rows, first_key, keys: where the sequence starts among packed ones, and its sizes.
    offset: query 0's position; query i sees the keys j with low <= j - i <= high.
    """

    batch: Any
    group: Any
    first_row: Any
    rows: Any
    first_key: Any
    keys: Any
    offset: Any
    low: Any
    high: Any


class Blocks(NamedTuple):
    """What a program walks over, from begin to end; between full_begin and full_end without a mask.

    Both of the inner ends are multiples of a block, or the outer ones.
    """

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def place(shape, extra, BATCHES: tl.constexpr):
    """The place and the tile of this program; the last tile comes first.

    Under a causal mask the last rows have the most keys: what takes longest starts first. Beyond
    the last tile of packed sequences the sequence is shape.batches, which has no rows.
    """
    index = tl.program_id(0) % shape.tiles
    head = tl.program_id(0) // shape.tiles
    if shape.tile_ends is None:
        batch = head // shape.groups
        group = head % shape.groups
        tile = shape.tiles - 1 - index
    else:
        every = tl.arange(0, BATCHES)
        ends = tl.load(shape.tile_ends + every, every < shape.batches, other=2147483647)
        batch = tl.sum((ends <= index).to(tl.int32), 0)
        group = head
        tile = (index - tl.max(tl.where(ends <= index, ends, 0), 0)).to(tl.int32)
    batch = batch.to(tl.int64)
    first_row, rows, first_key, keys, offset = sequence(batch, shape, extra)
    low, high = band(offset, extra)
    return Place(batch, group, first_row, rows, first_key, keys, offset, low, high), tile


@triton.jit
def sequence(batch, shape, extra):
    """A sequence's first row and its rows, its first key and its keys, and query 0's position."""
    if shape.ends_q is not None:
        real = batch < shape.batches
        first_row = tl.load(shape.ends_q + batch, real, other=0).to(tl.int64)
        first_key = tl.load(shape.ends_k + batch, real, other=0).to(tl.int64)
        rows = (tl.load(shape.ends_q + batch + 1, real, other=0) - first_row).to(tl.int32)
        keys = (tl.load(shape.ends_k + batch + 1, real, other=0) - first_key).to(tl.int32)
    else:
        first_row = batch * 0
        first_key = batch * 0
        rows = first_row.to(tl.int32) + shape.rows
        keys = first_row.to(tl.int32) + shape.keys
        if extra.lengths is not None:
            length = tl.load(extra.lengths + batch).to(tl.int64)
            keys = tl.minimum(tl.maximum(length, 0), shape.keys).to(tl.int32)
    if extra.offsets is not None:
        offset = tl.load(extra.offsets + batch).to(tl.int64)
    elif extra.offset is not None:
        offset = batch * 0 + extra.offset
    else:
        offset = (keys - rows).to(tl.int64)
    return first_row, rows, first_key, keys, offset


@triton.jit
def near(position):
    """A position in int32; sums of two of them stay inside."""
    return tl.minimum(tl.maximum(position, -1073741824), 1073741824).to(tl.int32)


@triton.jit
def band(offset, extra):
    """low, high: query i sees the keys j with low <= j - i <= high."""
    low = near(offset * 0 - 1073741824)
    high = near(offset * 0 + 1073741824)
    if extra.left is not None:
        low = near(offset - extra.left)
    if extra.right is not None:
        high = near(offset + extra.right)
    return low, high


@triton.jit
def keys_of(first, last, at, extra, BLOCK: tl.constexpr):
    """Of the queries first to last: the blocks of keys that some see, and those that all see.

    Blocks start at multiples of BLOCK, whatever the queries are:
    so a query's keys are summed in the same order in every tile.
    """
    begin = first * 0
    full_begin = begin
    end = at.keys
    full_end = at.keys
    if extra.left is not None:
        begin = tl.maximum(first + at.low, 0) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last + at.low, 0), BLOCK) * BLOCK
    if extra.right is not None:
        end = tl.maximum(tl.minimum(at.keys, last + at.high + 1), 0)
        full_end = tl.maximum(tl.minimum(at.keys, first + at.high + 1), 0)
    full_end = full_end // BLOCK * BLOCK
    if extra.mask is not None:
        full_begin = begin
        full_end = begin
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    return Blocks(begin, full_begin, tl.maximum(full_end, full_begin), end)


@triton.jit
def rows_of_keys(first, last, at, extra, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the keys first to last: the blocks of packed rows that see some, and that see all."""
    begin = first * 0
    full_begin = begin
    end = at.rows
    full_end = at.rows
    if extra.right is not None:
        begin = tl.minimum(tl.maximum(first - at.high, 0), at.rows) * SHARE // BLOCK * BLOCK
        full_begin = tl.minimum(tl.maximum(last - at.high, 0), at.rows)
    if extra.left is not None:
        end = tl.maximum(tl.minimum(at.rows, last - at.low + 1), 0)
        full_end = tl.maximum(tl.minimum(at.rows, first - at.low + 1), 0)
    end = end * SHARE
    full_begin = tl.cdiv(full_begin * SHARE, BLOCK) * BLOCK
    full_end = full_end * SHARE // BLOCK * BLOCK
    if extra.mask is not None:
        full_end = begin
        full_begin = begin
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    return Blocks(begin, full_begin, tl.maximum(full_end, full_begin), end)


@triton.jit
def query_tile(at, tile, extra, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The packed rows of a tile, the query and the head of each (as columns), and their keys."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = (row // SHARE)[:, None]
    head = (at.group * SHARE + row % SHARE)[:, None]
    last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARE, at.rows - 1)
    keys = keys_of(tile * BLOCK_M // SHARE, last_query, at, extra, BLOCK_N)
    return row, query, head, keys


@triton.jit
def part_of(blocks, PART: tl.constexpr):
    """Where the blocks before (0), among (1) and behind (2) those without a mask start and stop."""
    if PART == 0:
        start, stop = blocks.begin, blocks.full_begin
    elif PART == 1:
        start, stop = blocks.full_begin, blocks.full_end
    else:
        start, stop = blocks.full_end, blocks.end
    return start, stop


@triton.jit
def load_tile(pointers, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """A tile of rows of WIDTH; zeros behind, and (CHECKED) where a row is not inside."""
    column = tl.arange(0, BLOCK)[None, :]
    if CHECKED:
        inside = inside[:, None]
        if WIDTH != BLOCK:
            inside = inside & (column < WIDTH)
        tile = tl.load(pointers, inside, other=0)
    elif WIDTH != BLOCK:
        tile = tl.load(pointers, column < WIDTH, other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(
    operand,
    at,
    row,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """A tile of packed rows (`row`, 1-D), (rows, BLOCK); zeros where there is none."""
    start = operand.data + at.batch * operand.batch + at.first_row * operand.row
    start += (at.group * SHARE).to(tl.int64) * operand.head
    steps = (row // SHARE).to(tl.int64) * operand.row + (row % SHARE) * operand.head
    pointers = start + steps[:, None] + tl.arange(0, BLOCK)[None, :]
    return load_tile(pointers, row < at.rows * SHARE, WIDTH, BLOCK, CHECKED)


@triton.jit
def load_key_rows(
    operand, at, key, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr
):
    """A tile of keys or values (`key`, 1-D), not in pages; zeros where there is none."""
    start = operand.data + at.batch * operand.batch + at.first_key * operand.row
    start += at.group.to(tl.int64) * operand.head
    pointers = start + (key.to(tl.int64) * operand.row)[:, None] + tl.arange(0, BLOCK)[None, :]
    return load_tile(pointers, key < at.keys, WIDTH, BLOCK, CHECKED)


@triton.jit
def place_keys(operand, at, key, inside, shape):
    """Where keys (1-D) start in an operand of one head a group, and which of them exist.

    In pages, a key whose page does not exist is told apart, so that it can count as NaN.
    """
    start = operand.data + at.group.to(tl.int64) * operand.head
    if shape.page_table is None:
        start += at.batch * operand.batch + at.first_key * operand.row
        pointers = start + key.to(tl.int64) * operand.row
        exists = inside
    else:
        entry = shape.page_table + at.batch * shape.table_stride + key // shape.page_length
        page = tl.load(entry, inside, other=0).to(tl.int64)
        exists = inside & (page >= 0) & (page < shape.pages)
        place_in_page = (key % shape.page_length).to(tl.int64) * operand.row
        pointers = start + page * operand.batch + place_in_page
    return pointers, exists


@triton.jit
def load_keys(pointers, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """A tile (keys, BLOCK) from each key's start; zeros where it is not inside."""
    return load_tile(
        pointers[:, None] + tl.arange(0, BLOCK)[None, :], inside, WIDTH, BLOCK, CHECKED
    )


@triton.jit
def tanh(x):
    """tanh(x) in float32, to 2 units in the last place.

    Near 0 by an odd polynomial (Cephes, tanhf), where 1 - 2 / (e + 1) would cancel.
    """
    s = x * x
    p = tl.fma(-5.70498872745e-3, s, 2.06390887954e-2)
    p = tl.fma(tl.fma(p, s, -5.37397155531e-2), s, 0.133314422036)
    near_zero = x + x * s * tl.fma(p, s, -0.333332819422)
    return tl.where(tl.abs(x) < 0.625, near_zero, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def mask_at(at, head, query, key, extra):
    """Where the mask's elements are."""
    start = at.batch * extra.mask_batch + head.to(tl.int64) * extra.mask_head
    return extra.mask + (start + query.to(tl.int64) * extra.mask_row + key * extra.mask_key)


@triton.jit
def scores(product, at, head, query, key, inside, extra):
    """q . k as what extra.factor turns into an exponent, and its slope by softcap (else 1)."""
    slope = 1.0
    if extra.softcap is not None:
        t = tanh(product * (extra.scale / extra.softcap))
        slope = 1.0 - t * t
        product = t * extra.softcap
    elif extra.slopes is not None or (
        extra.mask is not None and extra.mask.dtype.element_ty.is_floating()
    ):
        product *= extra.scale
    if extra.slopes is not None:
        slopes = extra.slopes + at.batch * extra.slopes_batch + head * extra.slopes_head
        distance = tl.abs(near(at.offset) + query - key).to(tl.float32)
        product -= tl.load(slopes).to(tl.float32) * distance
    if extra.mask is not None and extra.mask.dtype.element_ty.is_floating():
        added = tl.load(mask_at(at, head, query, key, extra), inside, other=0.0)
        product += added.to(tl.float32)
    return product, slope


@triton.jit
def visible(at, head, query, key, inside, extra):
    """Which query may attend to which key; `inside` where both exist."""
    seen = inside
    if extra.left is not None:
        seen = seen & (key - query >= at.low)
    if extra.right is not None:
        seen = seen & (key - query <= at.high)
    if extra.mask is not None and not extra.mask.dtype.element_ty.is_floating():
        seen = seen & (tl.load(mask_at(at, head, query, key, extra), inside, other=0) != 0)
    return seen


@triton.jit
def mix(x):
    """The hash of attention's contract, in uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(at, head, query, key, shape, extra, SHARE: tl.constexpr):
    """Which weights dropout keeps."""
    row = (at.batch * shape.groups * SHARE + head) * shape.rows + query
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    start = mix(tl.full([1, 1], extra.seed_low, tl.uint32))
    start = mix(start ^ tl.full([1, 1], extra.seed_high, tl.uint32))
    start = mix(mix(start ^ low) ^ high)
    hashed = mix(start + key.to(tl.uint32) * 0x9E3779B9)
    return hashed >= tl.full([1, 1], extra.threshold, tl.uint32)


@triton.jit
def is_finite(x):
    """x is neither NaN nor inf."""
    wide = x.to(tl.float32)
    return wide - wide == 0.0
