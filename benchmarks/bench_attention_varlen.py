"""attention_varlen against SDPA of each sequence alone.

Bound by multiply-adds: 4 D operations for each attending pair forward, 10 D backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .bench_attention import work
from .cases import Bench, Peer


def sample(shape: shapes.Heads, draw: Draw) -> Sample:
    """B sequences of T tokens."""
    q = draw.normal(shape.B * shape.T, shape.H, shape.D)
    k, v = (draw.normal(shape.B * shape.S, shape.G, shape.D) for _ in range(2))
    ends = (torch.arange(shape.B + 1, dtype=torch.int32) * n for n in (shape.T, shape.S))
    return Sample(shape.label, (q, k, v, *ends), {"causal": shape.causal})


def one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    *,
    causal: bool,
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
    parts = []
    for part in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        one_q, one_k, one_v = (t.transpose(0, 1)[None] for t in part)
        y = F.scaled_dot_product_attention(
            one_q, one_k, one_v, is_causal=causal, enable_gqa=grouped
        )
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


def peers(shape: shapes.Heads) -> list[Peer]:
    return [Peer("SDPA of each sequence", one_by_one)]


BENCH = Bench("attention_varlen", shapes.VARLEN, shapes.TINY_HEADS, sample, work, peers)
