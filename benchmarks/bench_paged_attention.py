"""paged_attention against gathering the pages for SDPA.

Decoding is bound by reading the keys and values, prefill by multiply-adds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .bench_attention import work
from .cases import Bench, Peer

PAGE = 16
"""Places in a page, vLLM's default."""


def sample(shape: shapes.Heads, draw: Draw) -> Sample:
    """Full sequences, their pages in random places."""
    columns = -(-shape.S // PAGE)
    pages = shape.B * columns
    q = draw.normal(shape.B, shape.H, shape.T, shape.D)
    k, v = (draw.normal(pages, shape.G, PAGE, shape.D) for _ in range(2))
    order = torch.randperm(pages, generator=draw.generator).to(torch.int32)
    lengths = torch.full((shape.B,), shape.S, dtype=torch.int32)
    table = order.reshape(shape.B, columns)
    return Sample(shape.label, (q, k, v, table, lengths), {"causal": shape.causal})


def gathered(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    causal: bool,
) -> torch.Tensor:
    """All sequences have one length here, and causal calls have as many queries as keys."""
    keys = int(lengths[0])
    k, v = (p[table].transpose(1, 2).flatten(2, 3)[:, :, :keys] for p in (k_pages, v_pages))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def peers(shape: shapes.Heads) -> list[Peer]:
    return [Peer("gather and SDPA", gathered)]


BENCH = Bench("paged_attention", shapes.PAGED, shapes.TINY_HEADS, sample, work, peers)
