"""linear against torch's own (MKL or oneDNN), eager.

Many rows are bound by multiply-adds, few by reading the weight.
"""

from __future__ import annotations

import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work


def sample(shape: shapes.Product, draw: Draw) -> Sample:
    return Sample(shape.label, (draw.normal(shape.M, shape.K), draw.normal(shape.N, shape.K)))


def work(shape: shapes.Product, itemsize: int, mode: str) -> Work:
    """The backward pass makes two products: of dx and of dweight."""
    products = 2 if mode == shapes.BACKWARD else 1
    elements = shape.M * shape.K + shape.N * shape.K + shape.M * shape.N
    flops = 2 * shape.M * shape.K * shape.N * products
    return Work(elements * itemsize * products, flops, "fma" if shape.M >= 48 else "read")


def peers(shape: shapes.Product) -> list[Peer]:
    return [Peer("F.linear", F.linear)]


BENCH = Bench("linear", shapes.LINEAR, shapes.TINY_PRODUCT, sample, work, peers)
