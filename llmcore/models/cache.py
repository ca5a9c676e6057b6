"""The key/value cache: what a decoder remembers of the tokens it has already read.

Each layer has two buffers, keys and values, (B, G, capacity, D). A sequence always starts in slot 0
and its slots have no holes, whatever padding it came with: sequence b holds `lengths[b]` tokens in
the slots below `lengths[b]`, and what lies behind them is never read. So a row's keys stand at the
same slots in every batch, and padding costs no attention.

It is for inference: no gradient goes back through the buffers. A forward pass makes room once, lets
every layer store, and commits at its end; a pass that fails half-way leaves the cache as it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import TransformerConfig


@dataclass(frozen=True)
class Span:
    """Where the T new tokens of one forward pass go.

    positions   (T,) or, when the sequences have different lengths, (B, T); int64
    kv_lengths  (B,) int64: tokens of each sequence with the new ones; None when all are `end`
    q_offset    int or (B,): the position of the first new token
    end         slots in use after the pass, over all sequences
    """

    positions: Tensor
    kv_lengths: Tensor | None
    q_offset: int | Tensor
    end: int


class KVCache:
    """Keys and values of B sequences, all layers, in buffers that double when they are full.

    `capacity` slots are reserved at the first use. Growing copies, so that a cache which grows from
    empty to S tokens copies at most 2 S of them in all.
    """

    def __init__(self, config: TransformerConfig, batch: int, capacity: int = 256) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
        self.config = config
        self.batch = batch
        self.capacity = min(capacity, config.context_length)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.plan: Any = None  # of the native pass that fills it: models/plan.py
        self._longest = 0
        self._lengths: Tensor | None = None  # None: all sequences have _longest tokens

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return self._longest

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, the tokens of each sequence."""
        if self._lengths is None:
            return torch.full((self.batch,), self._longest)
        return self._lengths

    def reserve(self, like: Tensor, counts: Tensor | None) -> Span:
        """Room for the new tokens of a pass.

        like    (B, T, C): the new tokens' vectors; gives T, dtype and device
        counts  (B,) int64: how many of the T belong to each sequence (the first ones); None = all
        """
        batch, new = like.shape[:2]
        if batch != self.batch:
            raise ValueError(f"this cache holds {self.batch} sequences, got ids of {batch}")
        self._make_room(self._longest + new, like)
        steps = torch.arange(new, device=like.device)
        if self._lengths is None:
            start = self._longest
            kv_lengths = None if counts is None else start + counts
            return Span(start + steps, kv_lengths, start, start + new)
        kv_lengths = self._lengths + (new if counts is None else counts)
        positions = self._lengths[:, None] + steps
        return Span(positions, kv_lengths, self._lengths, self._longest + new)

    def store(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Put k and v (B, G, T, D) into `layer`; returns all its keys and values (B, G, end, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if span.positions.ndim == 1:
            start = span.end - k.shape[2]
            keys[:, :, start : span.end] = k
            values[:, :, start : span.end] = v
        else:
            rows = torch.arange(self.batch, device=k.device)[:, None]
            keys.transpose(1, 2)[rows, span.positions] = k.transpose(1, 2)
            values.transpose(1, 2)[rows, span.positions] = v.transpose(1, 2)
        return keys[:, :, : span.end], values[:, :, : span.end]

    def commit(self, span: Span) -> None:
        """The pass is through: its tokens now count."""
        self._longest = span.end
        if span.kv_lengths is not None:
            self._set_lengths(span.kv_lengths)

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences, (K,) int64 indices, in this order."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.batch = len(rows)
        if self._lengths is not None:
            self._set_lengths(self._lengths[rows])

    def _set_lengths(self, lengths: Tensor) -> None:
        shortest, longest = lengths.aminmax()
        self._longest = int(longest)
        self._lengths = None if bool(shortest == longest) else lengths

    def _make_room(self, needed: int, like: Tensor) -> None:
        limit = self.config.context_length
        if needed > limit:
            raise ValueError(
                f"{self._longest} tokens in the cache and {needed - self._longest} new ones "
                f"exceed the context length of {limit}"
            )
        if self.keys and needed <= self.capacity:
            return
        while self.capacity < needed:
            self.capacity = min(2 * self.capacity, limit)
        self.keys = [self._grown(like, self.keys, i) for i in range(self.config.layers)]
        self.values = [self._grown(like, self.values, i) for i in range(self.config.layers)]

    def _grown(self, like: Tensor, old: list[Tensor], layer: int) -> Tensor:
        shape = (self.batch, self.config.kv_heads, self.capacity, self.config.head_width)
        buffer = like.new_empty(shape)
        if old:
            buffer[:, :, : self._longest] = old[layer][:, :, : self._longest]
        return buffer
