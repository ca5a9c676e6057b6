"""linear_cross_entropy against a linear and F.cross_entropy, F.linear_cross_entropy in chunks, and
chunks as Liger takes them.

Bound by multiply-adds: forward makes one product, both passes together three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmcore.ops.sample import Draw, Sample

from . import shapes
from .cases import Bench, Peer, Work


def sample(shape: shapes.Product, draw: Draw) -> Sample:
    x, weight = draw.normal(shape.M, shape.K), draw.normal(shape.N, shape.K)
    target = draw.integers(0, shape.N, shape.M)
    return Sample(shape.label, (x, weight * shape.K**-0.5, target))


def work(shape: shapes.Product, itemsize: int, mode: str) -> Work:
    both = mode == shapes.BOTH
    elements = (2 if both else 1) * (shape.M * shape.K + shape.N * shape.K)
    flops = 2 * shape.M * shape.K * shape.N * (3 if both else 1)
    return Work(elements * itemsize + 8 * shape.M, flops, "fma")


def linear_then_loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def in_torchs_chunks() -> Callable[..., torch.Tensor]:
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return functools.partial(F.linear_cross_entropy, options=options)


class LigersChunks(torch.autograd.Function):
    """The logits of a chunk of rows at a time; its gradients are made in the forward pass.

    Chunks are as large as Liger Kernel chooses them: so that the logits of one are about x's size.
    (Hsu et al., Liger Kernel, 2024, section 3.2.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        rows, width = x.shape
        at_least = rows * width // weight.shape[0]
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        loss = x.new_zeros((), dtype=torch.float32)
        for at in torch.arange(rows).split(1 << at_least.bit_length()):
            part = slice(int(at[0]), int(at[-1]) + 1)
            logits = F.linear(x[part], weight).float()
            loss += F.cross_entropy(logits, target[part], reduction="sum")
            dlogits = logits.softmax(-1)
            dlogits[torch.arange(len(at)), target[part]] -= 1
            dlogits = (dlogits / rows).to(x.dtype)
            torch.mm(dlogits, weight, out=dx[part])
            dweight.addmm_(dlogits.T, x[part])
        ctx.save_for_backward(dx, dweight)
        return (loss / rows).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[Any, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx, dweight, None) if dloss == 1 else (dx * dloss, dweight * dloss, None)


def peers(shape: shapes.Product) -> list[Peer]:
    found = [Peer("F.linear, F.cross_entropy", linear_then_loss)]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        found.append(Peer("F.linear_cross_entropy", in_torchs_chunks(), quick_modes=()))
    both = (shapes.BOTH,)
    found.append(Peer("Liger's chunks", LigersChunks.apply, modes=both, quick_modes=()))
    return found


BENCH = Bench(
    "linear_cross_entropy", shapes.LINEAR_LOSS, shapes.TINY_LINEAR_LOSS, sample, work, peers
)
