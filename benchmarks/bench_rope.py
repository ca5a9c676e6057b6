"""rope, half-split, against the usual torch code, eager and compiled.

Bound by memory: each pass moves 2 elements; the angles are read once for each position.
"""

from __future__ import annotations

import torch

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sample(shape: shapes.Heads, draw: Draw) -> Sample:
    x = draw.normal(shape.B, shape.H, shape.T, shape.D)
    angle = draw.normal(shape.T, shape.D // 2)
    # By name: the backward pass that is timed is that of the positional arguments.
    table = {"cos": angle.cos(), "sin": angle.sin()}
    return Sample(shape.label, (x,), table, keep=("cos", "sin"))


def work(shape: shapes.Heads, itemsize: int, mode: str) -> Work:
    elements = shape.B * shape.H * shape.T * shape.D
    return Work(2 * elements * itemsize + 4 * shape.T * shape.D, 3 * elements, "copy")


def torch_rope(x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """With a product for each half, as Hugging Face has it."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def peers(shape: shapes.Heads) -> list[Peer]:
    return [Peer("products and cat", torch_rope), compiled("products and cat", torch_rope)]


BENCH = Bench("rope", shapes.ROPE, shapes.TINY_HEADS, sample, work, peers)
