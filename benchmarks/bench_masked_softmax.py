"""causal masked_softmax against torch's softmax of masked scores, eager and compiled.

Bound by memory: forward moves 2 elements, backward 3; of the hidden ones only the zeros written.
"""

from __future__ import annotations

import functools
import math

import torch

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled


def sizes(shape: shapes.Rows) -> tuple[int, int, int]:
    """The rows as heads of (T, S) with T = S where there are enough."""
    rows = min(shape.N, shape.C)
    return shape.N // rows, rows, shape.C


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    return Sample(shape.label, (draw.normal(*sizes(shape)),), {"causal": True, "scale": 0.125})


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    heads, rows, keys = sizes(shape)
    seen = heads * sum(keys - rows + i + 1 for i in range(rows))
    elements = (2 if backward else 1) * seen + shape.N * shape.C
    return Work(elements * itemsize, 5 * seen, "copy")


def torch_masked_softmax(
    hidden: torch.Tensor, x: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    return (x * scale).masked_fill(hidden, -math.inf).softmax(-1)


def peers(shape: shapes.Rows) -> list[Peer]:
    _, rows, keys = sizes(shape)
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    function = functools.partial(torch_masked_softmax, hidden)
    return [Peer("masked_fill, softmax", function), compiled("masked_fill, softmax", function)]


BENCH = Bench("masked_softmax", shapes.SCORES, shapes.TINY_ROWS, sample, work, peers)
