"""attention against SDPA, compiled flex_attention (which has no backward pass on the CPU) and
onnxruntime's.

Bound by multiply-adds where many queries share the keys: 4 D operations for each attending pair
forward (two products), 10 D backward (five, the scores being recomputed). One query is bound by
reading k and v.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work
from .other_libraries import onnxruntime_peer

FEW_QUERIES = 8
"""Up to so many queries the keys and values are read faster than they are multiplied."""


def sample(shape: shapes.Heads, draw: Draw) -> Sample:
    q = draw.normal(shape.B, shape.H, shape.T, shape.D)
    k, v = (draw.normal(shape.B, shape.G, shape.S, shape.D) for _ in range(2))
    return Sample(shape.label, (q, k, v), {"causal": shape.causal})


def work(shape: shapes.Heads, itemsize: int, mode: str) -> Work:
    queries = shape.B * shape.H * shape.T * shape.D  # elements of q, and of y
    keys = shape.B * shape.G * shape.S * shape.D  # of k, and of v
    if mode == shapes.BACKWARD:  # reads q, k, v, y, dy; writes dq, dk, dv
        elements, products = 4 * queries + 4 * keys, 5
    else:
        elements, products = 2 * queries + 2 * keys, 2
    bound = "read" if shape.T * shape.H // shape.G <= FEW_QUERIES else "fma"
    return Work(elements * itemsize, 2 * products * shape.pairs * shape.D, bound)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def sdpa_on_repeated_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """As transformers does it: the key/value heads are written out for each query head."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(share, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def flex_attention(shape: shapes.Heads) -> Peer:
    from torch.nn.attention import flex_attention as flex

    def is_visible(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    mask = None
    if shape.causal:
        mask = flex.create_block_mask(is_visible, None, None, shape.T, shape.S, device="cpu")
    function = functools.partial(
        torch.compile(flex.flex_attention, dynamic=False),
        block_mask=mask,
        enable_gqa=shape.H != shape.G,
    )

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        return function(q, k, v)

    modes = (shapes.FORWARD,)
    return Peer("compiled flex_attention", call, modes=modes, quick_modes=(), is_compiled=True)


def onnx_arguments(*tensors: torch.Tensor, causal: bool) -> tuple[Any, dict[str, Any]]:
    # Its causal is aligned at the top left, ours at the end: the same where T = S.
    return tensors, {"is_causal": int(causal)}


def peers(shape: shapes.Heads) -> list[Peer]:
    found = [Peer("SDPA", sdpa)]
    if shape.H != shape.G:
        found.append(Peer("SDPA on repeated heads", sdpa_on_repeated_heads))
    return [*found, flex_attention(shape), onnxruntime_peer("Attention", onnx_arguments)]


BENCH = Bench("attention", shapes.ATTENTION, shapes.TINY_HEADS, sample, work, peers)
