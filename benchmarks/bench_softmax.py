"""softmax over the last axis against torch's, eager and compiled.

Bound by memory: forward moves 2 elements, backward 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, (draw.normal(shape.N, shape.C),))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C
    return Work(
        (3 if backward else 2) * elements * itemsize, (4 if backward else 5) * elements, "copy"
    )


def torch_softmax(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, -1)


def torch_softmax_into(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1, out=out)


def peers(shape: shapes.Rows) -> list[Peer]:
    return [
        Peer("F.softmax", torch_softmax, torch_softmax_into),
        compiled("F.softmax", torch_softmax),
    ]


BENCH = Bench("softmax", shapes.SOFTMAX, shapes.TINY_ROWS, sample, work, peers)
