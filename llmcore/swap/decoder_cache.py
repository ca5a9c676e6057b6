"""Buffers of which the tensors of transformers' DynamicCache are views.

Whoever looks into the cache, crops or reorders it finds what he expects; and a pass writes new
tokens behind those that are there instead of copying all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import TransformerConfig

CACHE_NAMES = ("cache", "past_key_values")
"""What a forward and its output call their cache: since transformers 5.24, and before."""


@dataclass
class Held:
    """Buffers (B, G, capacity, D) of a cache's layers, and the views of them that it holds."""

    keys: list[Tensor]
    values: list[Tensor]
    views: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def is_held_by(self, layers: Sequence[Any]) -> bool:
        return len(self.views) == len(layers) and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(layers, self.views, strict=True)
        )

    def show(self, layers: Sequence[Any], length: int) -> None:
        """Make the cache's tensors the views of the first `length` tokens, or the last of them."""
        self.views = []
        for layer, k, v in zip(layers, self.keys, self.values, strict=True):
            begin, window = 0, window_of(layer)
            if window:
                begin = max(length - window + 1, 0)
                layer.cumulative_length = length
            keys, values = k[:, :, begin:length], v[:, :, begin:length]
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.views.append((keys, values))


def held(cache: Any, config: TransformerConfig, batch: int, new: int, dtype: torch.dtype) -> Held:
    """Buffers with room for `new` more tokens, that hold what the cache holds."""
    layers, length = cache.layers, cache.get_seq_length()
    found = vars(cache).get("_llmcore_held")
    if found is not None and found.is_held_by(layers) and length + new <= found.capacity:
        return found
    capacity = max(2 * length, length + new + 64)
    shape = (batch, config.kv_heads, capacity, config.head_width)
    made = Held(
        [torch.zeros(shape, dtype=dtype) for _ in layers],
        [torch.zeros(shape, dtype=dtype) for _ in layers],
    )
    if length:
        for layer, keys, values in zip(layers, made.keys, made.values, strict=True):
            begin = length - layer.keys.shape[2]  # what a window has let go is read by nobody
            keys[:, :, begin:length] = layer.keys
            values[:, :, begin:length] = layer.values
    cache._llmcore_held = made
    return made


def new_cache(config: Any) -> Any:
    """The cache that the models make where they are given none."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config)


def windows_of(cache: Any) -> tuple[int, ...] | None:
    """The window of each of a cache's layers, 0: none; None for a cache of another kind."""
    if cache is None:
        return None
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(x) not in kinds for x in cache.layers):
        return None
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return None
    return tuple(window_of(layer) for layer in cache.layers)


def window_of(layer: Any) -> int:
    """The keys that a query sees by this layer's cache, 0: all."""
    return getattr(layer, "sliding_window", 0)
