"""rms_norm against F.rms_norm, eager and compiled.

Bound by memory: forward moves 2 elements, backward 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, (draw.normal(shape.N, shape.C), draw.normal(shape.C), 1e-6))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C * (3 if backward else 2) + shape.C * (2 if backward else 1)
    return Work(elements * itemsize, shape.N * shape.C * (10 if backward else 4), "copy")


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def peers(shape: shapes.Rows) -> list[Peer]:
    return [Peer("F.rms_norm", torch_rms_norm), compiled("F.rms_norm", torch_rms_norm)]


BENCH = Bench("rms_norm", shapes.NORM, shapes.TINY_ROWS, sample, work, peers)
