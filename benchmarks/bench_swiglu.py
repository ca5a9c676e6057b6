"""swiglu of the two halves of one projection against torch's silu and product, eager and compiled.

Bound by memory: forward moves 3 elements, backward 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, tuple(draw.normal(shape.N, 2 * shape.C).chunk(2, -1)))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C
    return Work(
        (5 if backward else 3) * elements * itemsize, (10 if backward else 5) * elements, "copy"
    )


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def peers(shape: shapes.Rows) -> list[Peer]:
    return [
        Peer("F.silu * up", torch_swiglu),
        compiled("F.silu * up", torch_swiglu),
    ]


BENCH = Bench("swiglu", shapes.GATED, shapes.TINY_ROWS, sample, work, peers)
