"""Small calls of ops for the simulator of Triton's kernels, beside the contracts' smallest samples:
each way through a kernel that those don't take."""

from __future__ import annotations

from typing import Any

import torch

from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw, Sample

NAMED = {
    "attention_varlen": ("empty_sequences",),
    "paged_attention": ("odd_pages",),
    "linear_cross_entropy": ("mean_bias",),
    "linear": ("int8_many_groups", "int4_asymmetric"),
}
"""Samples of the contracts."""


def split_decode() -> Sample:
    """One query and 300 keys: more than one program's, so that a second kernel adds parts up."""
    draw = Draw(0)
    q, k, v = draw.normal(1, 4, 1, 16), draw.normal(1, 2, 300, 16), draw.normal(1, 2, 300, 24)
    return Sample("split_decode", (q, k, v), {"causal": True, "return_lse": True})


def split_decode_in_pages() -> Sample:
    """The same of int8 keys and values in pages, with their scales."""
    draw = Draw(1)
    table = torch.randperm(20, generator=draw.generator).to(torch.int32)[None]
    k, v = (draw.integers(-127, 128, 20, 2, 16, 16).to(torch.int8) for _ in range(2))
    scales = {name: draw.normal(20, 2, 16).abs() * 0.01 for name in ("k_scale", "v_scale")}
    lengths = torch.tensor([290], dtype=torch.int32)
    options: dict[str, Any] = {"causal": True, **scales}
    arguments = draw.normal(1, 4, 1, 16), k, v, table, lengths
    return Sample("split_decode_in_pages", arguments, options, keep=tuple(scales))


def samples(name: str) -> list[Sample]:
    """Of an op; none for most."""
    found = [s for s in REGISTRY[name].samples(Draw(0)) if s.name in NAMED.get(name, ())]
    made = {"attention": [split_decode()], "paged_attention": [split_decode_in_pages()]}
    return [*found, *made.get(name, [])]


def whole_tiles(name: str) -> list[Sample]:
    """Calls of attention or attention_varlen that fill the tiles of widths to 64 and to 128: full
    blocks, masked ones and the last rows and keys, forward and backward."""
    draw, found = Draw(2), []
    for width in (64, 128):
        if name == "attention":
            q, k, v = draw.normal(1, 2, 70, width), *(draw.normal(1, 1, 150, width) for _ in "kv")
            more: tuple[Any, ...] = ()
        else:
            q, k, v = draw.normal(130, 2, width), *(draw.normal(170, 1, width) for _ in "kv")
            more = tuple(torch.tensor(e, dtype=torch.int32) for e in ((0, 60, 130), (0, 80, 170)))
        found.append(Sample(f"tiles_{width}", (q, k, v, *more), {"causal": True}))
    return found
