"""add_rms_norm against x + residual and F.rms_norm, eager and compiled.

Bound by memory: forward moves 4 elements, backward 4 (dy, dtotal, total, dx).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    x, residual = draw.normal(shape.N, shape.C), draw.normal(shape.N, shape.C)
    return Sample(shape.label, (x, residual, draw.normal(shape.C), 1e-6))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = 4 * shape.N * shape.C + shape.C * (2 if backward else 1)
    return Work(elements * itemsize, shape.N * shape.C * (11 if backward else 5), "copy")


def torch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def peers(shape: shapes.Rows) -> list[Peer]:
    name = "x + residual, F.rms_norm"
    return [Peer(name, torch_add_rms_norm), compiled(name, torch_add_rms_norm)]


BENCH = Bench("add_rms_norm", shapes.NORM, shapes.TINY_ROWS, sample, work, peers, results=2)
