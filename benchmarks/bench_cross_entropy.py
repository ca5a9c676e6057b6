"""cross_entropy over a vocabulary against F.cross_entropy, eager and compiled.

Bound by memory: forward reads 1 element and writes nothing to speak of, backward reads and writes.
"""

from __future__ import annotations

import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    target = draw.integers(0, shape.C, shape.N)
    return Sample(shape.label, (draw.normal(shape.N, shape.C) * 3, target))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C
    return Work(
        (2 if backward else 1) * elements * itemsize + 8 * shape.N,
        (4 if backward else 3) * elements,
        "copy" if backward else "read",
    )


def peers(shape: shapes.Rows) -> list[Peer]:
    name = "F.cross_entropy"
    return [Peer(name, F.cross_entropy), compiled(name, F.cross_entropy)]


BENCH = Bench("cross_entropy", shapes.LOSS, shapes.TINY_LOSS, sample, work, peers)
