"""Where a cache's keys and values lie, one buffer of each for every layer, and the form they have.

As the model computes them (dtype None), rounded to bfloat16 ("bf16": half of float32's memory), or
as int8 ("int8": a quarter), each vector of a token and head with a float32 scale of its own, as
ops/quantize_rows.py says. Attention reads either beside float32 queries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmcore.ops.quantize_rows import quantize_rows

StoredDtype = Literal["bf16", "int8"]
STORED: dict[str | None, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}


@dataclass
class Buffers:
    """Keys and values of all layers; the scales' lists are empty where the form has none.

    keys, values              (..., S, D) each, S slots
    key_scales, value_scales  (..., S) each, float32
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    key_scales: list[Tensor] = field(default_factory=list)
    value_scales: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(
        cls, layers: int, shape: tuple[int, ...], like: Tensor, dtype: StoredDtype | None
    ) -> "Buffers":
        """Uninitialised buffers of the shape (..., S, D), on the device (and in the dtype) of
        `like`."""
        kept = STORED.get(dtype, like.dtype)
        keys, values = ([like.new_empty(shape, dtype=kept) for _ in range(layers)] for _ in "kv")
        if dtype != "int8":
            return cls(keys, values)
        scales = (
            [like.new_empty(shape[:-1], dtype=torch.float32) for _ in range(layers)] for _ in "kv"
        )
        return cls(keys, values, *scales)

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.keys, *self.values, *self.key_scales, *self.value_scales)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Buffers":
        """The same with every tensor changed; keys have an axis, D, that scales don't have."""
        lists = (self.keys, self.values, self.key_scales, self.value_scales)
        return Buffers(*([change(tensor) for tensor in tensors] for tensors in lists))

    def layer(self, layer: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Keys, then values of one layer, each with its scales."""
        for tensors, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            yield tensors[layer], scales[layer] if scales else None

    def read(
        self, layer: int, dtype: torch.dtype, seen: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Keys and values of one layer for queries of `dtype`, and the scales that attention takes
        beside them; of each buffer what `seen` gives. Queries that are not float32 get them
        decoded."""
        parts = [
            (seen(stored), None if scale is None else seen(scale))
            for stored, scale in self.layer(layer)
        ]
        (k, k_scale), (v, v_scale) = parts
        if dtype == torch.float32 and k_scale is not None and v_scale is not None:
            return k, v, {"k_scale": k_scale, "v_scale": v_scale}
        if dtype == torch.float32 or k.dtype == dtype:
            return k, v, {}
        return decode(k, k_scale, dtype), decode(v, v_scale, dtype), {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in get_args(StoredDtype):
        accepted = ", ".join(repr(name) for name in get_args(StoredDtype))
        raise ValueError(f"dtype must be None or one of {accepted}, got {dtype!r}")


def encode(x: Tensor, dtype: StoredDtype | None) -> tuple[Tensor, Tensor | None]:
    """Vectors (..., D) as they are stored, and their scales (...) where the form has them.

    A vector with NaN or inf has a scale that says so, and comes back as NaN.
    """
    if dtype is None:
        return x, None
    if dtype == "bf16":
        return x.to(torch.bfloat16), None
    return quantize_rows(x)


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The stored vectors (..., D) as numbers of `dtype`."""
    if scale is None:
        return stored.to(dtype)
    return (stored.float() * scale[..., None]).to(dtype)
