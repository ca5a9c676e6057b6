"""attention_varlen in Triton: attention's kernels, which find their sequence by where tiles end.

The grid is the most tiles that so many packed rows can have, since their ends are on the device;
what is too much ends at once.
"""

from typing import Any

import torch
import triton

from . import attention, attention_backward
from .attention import packed_operand
from .attention_scores import Shape
from .launch import factors


def tile_ends(ends: torch.Tensor, share: int, block: int) -> torch.Tensor:
    """Where each sequence's tiles of `block` packed rows end, (B) int32."""
    return ((ends.diff() * share + block - 1) // block).cumsum(0).to(torch.int32)


def shape_of(q: torch.Tensor, k: torch.Tensor, ends: Any) -> Shape:
    """The call's sizes, without the tiles."""
    ends_q, ends_k = ends.q.contiguous(), ends.k.contiguous()
    batches = ends_q.shape[0] - 1
    return Shape(q.shape[0], k.shape[0], batches, k.shape[1], 0, None, ends_q, ends_k)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Any, options: Any) -> Any:
    """y (total_q, H, Dv), and lse (H, total_q) with options.return_lse."""
    total, heads, _ = q.shape
    y = q.new_zeros(total, heads, v.shape[2])
    lse = q.new_full((heads, total), float("-inf"), dtype=torch.float32)
    shape = shape_of(q, k, ends)
    if y.numel() and shape.batches:
        q, scale, negate = attention.positive_scale(q, options.scale)
        q, k, v = map(attention.by_rows, (q, k, v))
        compute, share = factors(q, k), heads // k.shape[1]
        tiles = attention.forward_tiles(q, v.shape[2], total * share, compute)
        block = tiles["BLOCK_M"]
        count = total * share // block + shape.batches
        attention.run(
            tuple(map(packed_operand, (q, k, v))),
            shape._replace(tiles=count, tile_ends=tile_ends(shape.ends_q, share, block)),
            attention.extra_of(q, k.shape[0], None, options, scale),
            (y, packed_operand(y), attention.statistic(lse)),
            {
                **attention.constants(q, k, compute),
                **attention.widths(q, v),
                **tiles,
                "BATCHES": triton.next_power_of_2(shape.batches),
                "NEGATE": negate,
            },
        )
    return (y, lse) if options.return_lse else y


def backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: Any,
    options: Any,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv."""
    grads = tuple(torch.zeros_like(t) for t in (q, k, v))
    shape = shape_of(q, k, ends)
    if lse.numel() == 0 or k.shape[0] == 0 or shape.batches == 0:
        return grads
    q, k, v, dy, y = map(attention.by_rows, (q, k, v, dy, y))
    delta = attention_backward.delta_of(dy, y, None, packed_operand)
    compute, share = factors(q, k), q.shape[1] // k.shape[1]
    tiles = attention_backward.tiles_of(q, v.shape[2], compute, packed=True)
    programs = []
    for end, rows, each, block in (
        (shape.ends_k, k.shape[0], 1, tiles[0]["BLOCK_N"]),
        (shape.ends_q, q.shape[0], share, tiles[1]["BLOCK_M"]),
    ):
        count = rows * each // block + shape.batches
        programs.append((count, tile_ends(end, each, block), count * shape.groups))
    attention_backward.run(
        (
            *map(packed_operand, (q, k, v, dy)),
            *map(attention.statistic, (lse, delta)),
        ),
        tuple(map(packed_operand, grads)),
        shape,
        attention.extra_of(q, k.shape[0], None, options, options.scale),
        {
            **attention.constants(q, k, compute),
            **attention.widths(q, v),
            "BATCHES": triton.next_power_of_2(shape.batches),
        },
        tiles,
        (programs[0], programs[1]),
    )
    return grads
