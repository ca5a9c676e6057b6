"""The calls whose kernels are inspected: small, but with whole tiles, and rows in whole vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmcore.ops.packed_weight import pack
from llmcore.ops.sample import Draw, Sample

DIFFERENTIABLE = {"rope": 1}
"""Ops with a gradient of so many of their first arguments only."""


def rows_sample(name: str, rows: int, width: int) -> Sample:
    """A call of a row-wise op, in whole vectors."""
    draw = Draw(0)
    x, weight = draw.normal(rows, width), draw.normal(width)
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-6),
        "layer_norm": (x, weight, weight, 1e-5),
        "add_rms_norm": (x, x, weight, 1e-6),
        "add_layer_norm": (x, x, weight, weight, 1e-5),
        "softmax": (x,),
        "masked_softmax": (x,),
        "cross_entropy": (x, draw.integers(0, width - 1, rows)),
        "gelu": (x,),
        "swiglu": (x, x),
        "geglu": (x, x),
    }
    return Sample(f"{rows}x{width}", arguments[name])


def rope_sample() -> Sample:
    draw = Draw(0)
    return Sample("rope", (draw.normal(1, 4, 16, 128), draw.normal(16, 64), draw.normal(16, 64)))


def attention_samples() -> Iterator[Sample]:
    draw = Draw(0)
    for width in (64, 128):
        for rows, keys in ((256, 256), (1, 640)):
            q, k = draw.normal(1, 2, rows, width), draw.normal(1, 1, keys, width)
            yield Sample(f"{rows}x{keys}x{width}", (q, k, k), {"causal": True})


def varlen_samples() -> Iterator[Sample]:
    draw = Draw(0)
    ends = torch.tensor([0, 128, 256], dtype=torch.int32)
    for width in (64, 128):
        q, k = draw.normal(256, 2, width), draw.normal(256, 1, width)
        yield Sample(f"256x{width}", (q, k, k, ends, ends), {"causal": True})


def paged_samples() -> Iterator[Sample]:
    draw = Draw(0)
    table = torch.arange(40, dtype=torch.int32)[None]
    for width in (64, 128):
        pages = draw.normal(40, 1, 16, width)
        q, lengths = draw.normal(1, 2, 1, width), torch.tensor([640], dtype=torch.int32)
        yield Sample(f"1x640x{width}", (q, pages, pages, table, lengths), {"causal": True})


def linear_samples() -> Iterator[Sample]:
    draw = Draw(0)
    for format in ("int8", "int4"):
        weight = pack(draw.normal(256, 512), format, 32)
        yield Sample(f"{format}_1x512x256", (draw.normal(1, 512), weight))


def loss_sample() -> Sample:
    draw = Draw(0)
    arguments = draw.normal(128, 256), draw.normal(512, 256), draw.integers(0, 512, 128)
    return Sample("128x256x512", arguments)


def samples(name: str) -> list[Sample]:
    """Of an op, for all of its kernels."""
    several = {
        "attention": attention_samples,
        "attention_varlen": varlen_samples,
        "paged_attention": paged_samples,
        "linear": linear_samples,
    }
    if name in several:
        return list(several[name]())
    if name == "rope":
        return [rope_sample()]
    if name == "linear_cross_entropy":
        return [loss_sample()]
    return [rows_sample(name, 8, 2048)]


def has_gradient(name: str, sample: Sample) -> bool:
    """Decoding has none."""
    return name not in ("paged_attention", "linear") and "1x" not in sample.name[:2]
