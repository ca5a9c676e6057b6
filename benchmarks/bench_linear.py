"""linear against torch's own (MKL or oneDNN), packed by oneDNN, and numpy's OpenBLAS; a packed
weight against torch's weight-only products.

Many rows are bound by multiply-adds, few by reading the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llmcore.ops.linear import PackedWeight, pack
from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work
from .other_libraries import openblas_peer

GROUP = 32
FEW_ROWS = 48
"""Below so many rows a weight is read more slowly than it is multiplied."""

BITS = {"int8": 8, "int4": 4}


def sample(shape: shapes.Product, draw: Draw) -> Sample:
    x, weight = draw.normal(shape.M, shape.K), draw.normal(shape.N, shape.K)
    return Sample(shape.label, (x, pack(weight, shape.packed, GROUP) if shape.packed else weight))


def work(shape: shapes.Product, itemsize: int, mode: str) -> Work:
    """The backward pass makes two products: of dx and of dweight."""
    products = 2 if mode == shapes.BACKWARD else 1
    weights = shape.N * shape.K
    weight = weights * BITS[shape.packed] // 8 + 2 * weights // GROUP if shape.packed else None
    rows = (shape.M * shape.K + shape.M * shape.N) * itemsize
    size = rows + (weights * itemsize if weight is None else weight)
    flops = 2 * shape.M * shape.K * shape.N * products
    return Work(size * products, flops, "fma" if shape.M >= FEW_ROWS else "read")


def pack_onednn(x: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
    """As torch.compile does it when a model is frozen."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return x, packed, None, "none", [], ""


def pack_int8(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    """One scale for each output: coarser than groups of 32, and fewer bytes."""
    whole = weight.dequantize()
    scales = whole.abs().amax(1) / 127
    return x, (whole / scales[:, None]).round().to(torch.int8), scales.to(x.dtype)


def pack_int4(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    """The same values and groups as ours; torch's format has a zero point besides."""
    assert weight.scales is not None
    q = torch.stack((weight.values & 15, weight.values >> 4), -1).flatten(-2).int()
    scales = weight.scales.T.to(x.dtype)
    packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    return x, packed, weight.group, torch.stack((scales, torch.zeros_like(scales)), -1)


def whole_weight(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    return x, weight.dequantize().to(x.dtype)


def peers(shape: shapes.Product) -> list[Peer]:
    forward = (shapes.FORWARD,)
    if not shape.packed:
        onednn = torch.ops.mkldnn._linear_pointwise
        return [
            Peer("F.linear", F.linear),
            Peer(
                "oneDNN, packed",
                onednn,
                prepare=pack_onednn,
                modes=forward,
                dtypes=("fp32", "bf16"),
            ),
            openblas_peer(),
        ]
    whole = Peer("F.linear, whole weight", F.linear, prepare=whole_weight, modes=forward)
    if shape.packed == "int8":
        product = Peer(
            "_weight_int8pack_mm", torch._weight_int8pack_mm, prepare=pack_int8, modes=forward
        )
    else:
        int4 = torch._weight_int4pack_mm_for_cpu
        product = Peer("_weight_int4pack_mm", int4, prepare=pack_int4, modes=forward)
    return [product, whole]


BENCH = Bench("linear", shapes.LINEAR, shapes.TINY_PRODUCT, sample, work, peers)
