"""layer_norm against F.layer_norm, eager and compiled, and onnxruntime's.

Bound by memory: forward moves 2 elements, backward 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work, compiled
from .other_libraries import onnxruntime_peer


def sample(shape: shapes.Rows, draw: Draw) -> Sample:
    weight, bias = draw.normal(shape.C), draw.normal(shape.C)
    return Sample(shape.label, (draw.normal(shape.N, shape.C), weight, bias, 1e-5))


def work(shape: shapes.Rows, itemsize: int, mode: str) -> Work:
    backward = mode == shapes.BACKWARD
    elements = shape.N * shape.C * (3 if backward else 2) + shape.C * (3 if backward else 2)
    return Work(elements * itemsize, shape.N * shape.C * (14 if backward else 7), "copy")


def torch_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def torch_layer_norm_into(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, out: torch.Tensor
) -> torch.Tensor:
    """F.layer_norm's own kernel, below the public function, which takes no out."""
    statistics = [x.new_empty(x.shape[0], 1) for _ in range(2)]
    torch.ops.aten.native_layer_norm.out(
        *(x, weight.shape, weight, bias, eps), out0=out, out1=statistics[0], out2=statistics[1]
    )
    return out


def onnx_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    return (x, weight, bias), {"epsilon": eps}


def peers(shape: shapes.Rows) -> list[Peer]:
    return [
        Peer("F.layer_norm", torch_layer_norm, torch_layer_norm_into),
        compiled("F.layer_norm", torch_layer_norm),
        onnxruntime_peer("LayerNormalization", onnx_arguments),
    ]


BENCH = Bench("layer_norm", shapes.NORM, shapes.TINY_ROWS, sample, work, peers)
