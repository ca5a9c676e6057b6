"""geglu, by tanh, of the two halves of one projection against torch's gelu and product.

Bound by memory: forward moves 3 elements, backward 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, (*draw.normal(shape.N, 2 * shape.C).chunk(2, -1), "tanh"))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C
    return Work(
        (5 if backward else 3) * elements * itemsize, (20 if backward else 10) * elements, "copy"
    )


def torch_geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(gate, approximate=approximate) * up


def peers(shape: shapes.Rows) -> list[Peer]:
    return [
        Peer("F.gelu * up", torch_geglu),
        compiled("F.gelu * up", torch_geglu),
    ]


BENCH = Bench("geglu", shapes.GATED, shapes.TINY_ROWS, sample, work, peers)
