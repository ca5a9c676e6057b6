"""The key/value cache: what a decoder remembers of the tokens it has already read.

Each layer has two buffers, keys and values, (B, G, capacity, D). A sequence's slots have no holes,
whatever padding it came with: sequence b has its tokens in the slots from 0 to the number of those
it still holds, and what lies behind them is never read. So a row's keys stand at the same slots in
every batch, and padding costs no attention.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmcore import ops
from llmcore.models.cache_base import KEY_CHUNK, Cache, Span
from llmcore.models.config import TransformerConfig
from llmcore.models.kv_buffers import Buffers, StoredDtype, encode


class KVCache(Cache):
    """Keys and values of B sequences, all layers, each sequence's side by side.

    `capacity` slots are reserved at the first use. Buffers that are full double, which copies: a
    cache that grows from empty to S tokens copies at most 2 S of them in all. With `static` they
    never grow: they keep their addresses, and a pass that has no room is a ValueError.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int = 256,
        *,
        dtype: StoredDtype | None = None,
        static: bool = False,
    ) -> None:
        super().__init__(config, batch, dtype)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = min(capacity, config.context_length)
        self.static = static

    def reserve(self, new: int, like: Tensor, counts: Tensor | None) -> Span:
        self._check(like.shape[0], new)
        self._make_room(new, like)
        used, forgotten = (_same_or_tensor(n, like) for n in (self._used, self._forgotten))
        end = max(self._used) + new
        lengths = None if isinstance(used, int) else used + new
        if counts is not None:
            lengths = used + counts
        return Span(used + forgotten, new, lengths, used, end, like.device)

    def store(self, layer: int, k: Tensor, v: Tensor, span: Span) -> None:
        for new, (buffer, scales) in zip((k, v), self.buffers.layer(layer), strict=True):
            stored, scale = encode(new, self.dtype)
            _write(buffer, stored, span)
            if scales is not None and scale is not None:
                _write(scales, scale, span)

    def attend(self, layer: int, q: Tensor, span: Span, options: dict[str, Any]) -> Tensor:
        k, v, scales = self.buffers.read(layer, q.dtype, lambda tensor: tensor[:, :, : span.end])
        return ops.attention(
            q,
            k,
            v,
            causal=True,
            kv_lengths=span.kv_lengths,
            q_offset=span.q_offset,
            **options,
            **scales,
        )

    def _select(self, rows: list[int]) -> None:
        """As Cache says. Where rows only leave, those behind them move up; else, all are copied."""
        if all(first < second for first, second in pairwise(rows)):
            for tensor in self.buffers.tensors():
                for place, row in enumerate(rows):
                    if place != row:
                        tensor[place, :, : self._used[row]] = tensor[row, :, : self._used[row]]
            self.buffers = self.buffers.map(lambda tensor: tensor[: len(rows)])
        else:
            self.buffers = self.buffers.map(lambda tensor: tensor[rows])

    def _take(self, row: int) -> Buffers:
        return self.buffers.map(lambda tensor: tensor[row, :, : self._used[row]])

    def _put(self, row: int, buffers: Buffers, length: int) -> None:
        self._grow(length, buffers.keys[0])
        for tensor, source in zip(self.buffers.tensors(), buffers.tensors(), strict=True):
            tensor[row, :, :length] = source

    def _make_room(self, new: int, like: Tensor) -> None:
        if self.keys and max(self._used) + new > self.capacity:
            self._forget()
        self._grow(max(self._used) + new, like)

    def _forget(self) -> None:
        """Whole chunks that no query can see any more leave; the slots behind them move up."""
        for row, used in enumerate(self._used):
            if gone := self._unseen(row, KEY_CHUNK):
                for tensor in self.buffers.tensors():
                    tensor[row, :, : used - gone] = tensor[row, :, gone:used].clone()
                self._used[row] -= gone
                self._forgotten[row] += gone

    def _grow(self, needed: int, like: Tensor) -> None:
        """Buffers of at least `needed` slots, the first time in the dtype of `like`."""
        if self.static and needed > self.capacity:
            raise ValueError(f"the cache is full: {needed} slots needed, capacity {self.capacity}")
        if self.keys and needed <= self.capacity:
            return
        while self.capacity < needed:
            self.capacity = min(2 * self.capacity, self.config.context_length)
        shape = (self.batch, self.config.kv_heads, self.capacity, self.config.head_width)
        like = self.keys[0] if self.keys else like
        grown = Buffers.empty(self.config.layers, shape, like, self.dtype)
        used = max(self._used)
        for tensor, old in zip(grown.tensors(), self.buffers.tensors(), strict=False):
            tensor[:, :, :used] = old[:, :, :used]
        self.buffers = grown


def _same_or_tensor(numbers: list[int], like: Tensor) -> int | Tensor:
    """The number that all sequences share, else all, (B,) int64."""
    if numbers.count(numbers[0]) == len(numbers):
        return numbers[0]
    return torch.tensor(numbers, device=like.device)


def _write(buffer: Tensor, new: Tensor, span: Span) -> None:
    """new (B, G, T, ...) into buffer (B, G, capacity, ...)."""
    if isinstance(span.q_offset, int):
        buffer[:, :, span.q_offset : span.end] = new
        return
    rows = torch.arange(len(new), device=new.device)[:, None]
    slots = span.q_offset[:, None] + torch.arange(new.shape[2], device=new.device)
    buffer.transpose(1, 2)[rows, slots] = new.transpose(1, 2)
