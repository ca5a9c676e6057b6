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

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


def sample(shape: shapes.Product, draw: Draw) -> Sample:
    x, weight = draw.normal(shape.M, shape.K), draw.normal(shape.N, shape.K)
    return Sample(shape.label, (x, pack(weight, shape.packed, GROUP) if shape.packed else weight))


def work(shape: shapes.Product, itemsize: int, mode: str) -> Work:
    """The backward pass makes two products: of dx and of dweight."""
    products = 2 if mode == shapes.BACKWARD else 1
    weights = shape.N * shape.K
    scales = 2 * weights // GROUP if shape.packed in ("int8", "int4") else 0
    weight = weights * BITS.get(shape.packed, 8 * itemsize) // 8 + scales
    size = (shape.M * shape.K + shape.M * shape.N) * itemsize + weight
    flops = 2 * shape.M * shape.K * shape.N * products
    return Work(size * products, flops, "fma" if shape.M >= FEW_ROWS else "read")


def pack_onednn(x: torch.Tensor, weight: torch.Tensor | PackedWeight) -> tuple[Any, ...]:
    """As torch.compile does it when a model is frozen."""
    if isinstance(weight, PackedWeight):
        weight = weight.values
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return x, packed, None, "none", [], ""


def pack_int8(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    """One scale for each output: coarser than groups of 32, and fewer bytes."""
    whole = weight.dequantize()
    scales = whole.abs().amax(1) / 127
    return x, (whole / scales[:, None]).round().to(torch.int8), scales.to(x.dtype)


def pack_int4(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    """The same values and groups as ours; torch's format has a zero point besides."""
    groups = weight.dequantize().unflatten(1, (-1, weight.group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # what stands for -8
    q = (groups / (largest / -8)).round().int().flatten(1) + 8
    scales = (largest / -8).squeeze(-1).T.to(x.dtype)
    packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    return x, packed, weight.group, torch.stack((scales, torch.zeros_like(scales)), -1)


def whole_weight(x: torch.Tensor, weight: PackedWeight) -> tuple[Any, ...]:
    return x, weight.dequantize().to(x.dtype)


def onednn_peer(*dtypes: str, is_torch: bool) -> Peer:
    return Peer(
        "oneDNN, packed",
        torch.ops.mkldnn._linear_pointwise,
        prepare=pack_onednn,
        modes=(shapes.FORWARD,),
        dtypes=dtypes,
        is_torch=is_torch,
    )


def peers(shape: shapes.Product) -> list[Peer]:
    if not shape.packed:  # what packs the weight beforehand is shown, but has had time for it
        packed = onednn_peer("fp32", "bf16", is_torch=False)
        return [Peer("F.linear", F.linear), packed, openblas_peer()]
    forward = (shapes.FORWARD,)
    whole = Peer("F.linear, whole weight", F.linear, prepare=whole_weight, modes=forward)
    if shape.packed == "int8":
        int8 = torch._weight_int8pack_mm
        return [Peer("_weight_int8pack_mm", int8, prepare=pack_int8, modes=forward), whole]
    if shape.packed == "int4":
        int4 = torch._weight_int4pack_mm_for_cpu
        return [Peer("_weight_int4pack_mm", int4, prepare=pack_int4, modes=forward), whole]
    return [whole, onednn_peer(shape.packed, is_torch=True)]


BENCH = Bench("linear", shapes.LINEAR, shapes.TINY_PRODUCT, sample, work, peers)
