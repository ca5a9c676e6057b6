"""gelu by tanh against torch's, eager and compiled.

Bound by memory: forward moves 2 elements, backward 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, (draw.normal(shape.N, shape.C), "tanh"))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C
    return Work(
        (3 if backward else 2) * elements * itemsize, (18 if backward else 9) * elements, "copy"
    )


def torch_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


def torch_gelu_into(x: torch.Tensor, approximate: str, *, out: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=out)


def peers(shape: shapes.Rows) -> list[Peer]:
    return [
        Peer("F.gelu", torch_gelu, torch_gelu_into),
        compiled("F.gelu", torch_gelu),
    ]


BENCH = Bench("gelu", shapes.GELU, shapes.TINY_ROWS, sample, work, peers)
