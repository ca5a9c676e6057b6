"""A key/value cache in pages: sequences take memory by the tokens they have, and can share it.

Each layer has two pools, keys and values, (pages, G, page_length, D), for all sequences together; a
sequence's page table says where its tokens are (Kwon et al., PagedAttention, 2023). Sequences that
have the same beginning refer to the same pages; who writes into a shared one gets a copy first.
What attention computes has the same bits as from the plain cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llmcore import ops
from llmcore.models.cache_base import KEY_CHUNK, Cache, Span
from llmcore.models.config import TransformerConfig
from llmcore.models.kv_buffers import Buffers, StoredDtype, encode


@dataclass(frozen=True)
class PagedSpan(Span):
    """Where the new tokens go, in pages; padding goes nowhere.

    table         (B, columns) int64: the pages that sequences use in this pass
    source        rows and steps, (N,) each: the new tokens that count, N of the B T
    target        pages and places, (N,) each: where they go
    """

    table: Tensor
    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]


class PagedKVCache(Cache):
    """Keys and values of B sequences, all layers, in pools of pages.

    pages        how many the pools have: a pass that finds none free is a ValueError. None: they
                 double when all are in use.
    page_length  tokens of a page
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        pages: int | None = None,
        *,
        page_length: int = 64,
        dtype: StoredDtype | None = None,
    ) -> None:
        super().__init__(config, batch, dtype)
        if config.positions == "relative":
            raise ValueError("paged attention adds no relative positions to scores: take a KVCache")
        for name, value in (("pages", pages), ("page_length", page_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.pages = pages
        self.page_length = page_length
        self._tables: list[list[int]] = [[] for _ in range(batch)]
        self._users: list[int] = []  # of each page: how many sequences refer to it
        self._free: list[int] = []
        self._table: Tensor | None = None  # _tables as a tensor, while it is true

    @property
    def page_table(self) -> Tensor:
        """(B, columns) int64: the pages of each sequence in order; past its length, any page."""
        if self._table is None:
            columns = max(map(len, self._tables), default=0)
            rows = [pages + [0] * (columns - len(pages)) for pages in self._tables]
            self._table = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return self._table

    @property
    def pages_in_use(self) -> int:
        return len(self._users) - len(self._free)

    def reserve(self, new: int, like: Tensor, counts: Tensor | None) -> PagedSpan:
        self._check(like.shape[0], new)
        device = like.device
        self._make_pools(like)
        added = [new] * self.batch if counts is None else counts.tolist()
        for row, count in enumerate(added):
            self._forget(row)
            self._make_room(row, count)
        starts, forgotten, taken = torch.tensor((self._used, self._forgotten, added), device=device)
        steps = torch.arange(new, device=device)
        source = (steps < taken[:, None]).nonzero(as_tuple=True)
        slots = starts[source[0]] + source[1]
        table = self.page_table
        return PagedSpan(
            first=starts + forgotten,
            new=new,
            kv_lengths=starts + taken,
            q_offset=starts,
            end=max(self._used) + new,
            device=device,
            table=table,
            source=source,
            target=(table[source[0], slots // self.page_length], slots % self.page_length),
        )

    def store(self, layer: int, k: Tensor, v: Tensor, span: Span) -> None:
        assert isinstance(span, PagedSpan)
        for new, (pool, scales) in zip((k, v), self.buffers.layer(layer), strict=True):
            stored, scale = encode(new.transpose(1, 2)[span.source], self.dtype)
            pool.transpose(1, 2)[span.target] = stored
            if scales is not None and scale is not None:
                scales.transpose(1, 2)[span.target] = scale

    def attend(self, layer: int, q: Tensor, span: Span, options: dict[str, Any]) -> Tensor:
        assert isinstance(span, PagedSpan) and span.kv_lengths is not None
        k, v, scales = self.buffers.read(layer, q.dtype, lambda pool: pool)
        return ops.paged_attention(
            q,
            k,
            v,
            span.table,
            span.kv_lengths,
            causal=True,
            q_offset=span.q_offset,
            **options,
            **scales,
        )

    def truncate(self, lengths: Sequence[int] | Tensor) -> None:
        super().truncate(lengths)
        for pages, used in zip(self._tables, self._used, strict=True):
            while (len(pages) - 1) * self.page_length >= used:
                self._leave(pages.pop())

    def _select(self, rows: list[int]) -> None:
        """As Cache says. A sequence that is there twice has its pages once."""
        old, self._tables = self._tables, [list(self._tables[row]) for row in rows]
        for page in chain.from_iterable(self._tables):
            self._users[page] += 1
        for page in chain.from_iterable(old):
            self._leave(page)

    def _take(self, row: int) -> Buffers:
        pages, used = self._tables[row], self._used[row]
        return self.buffers.map(lambda pool: _side_by_side(pool[pages][None])[0, :, :used])

    def _put(self, row: int, buffers: Buffers, length: int) -> None:
        self._make_pools(buffers.keys[0])
        while self._tables[row]:
            self._leave(self._tables[row].pop())
        self._make_room(row, length)
        slots = torch.arange(length, device=self.page_table.device)
        target = self.page_table[row, slots // self.page_length], slots % self.page_length
        for pool, source in zip(self.buffers.tensors(), buffers.tensors(), strict=True):
            pool.transpose(1, 2)[target] = source.transpose(0, 1)

    def _forget(self, row: int) -> None:
        gone = self._unseen(row, math.lcm(KEY_CHUNK, self.page_length))
        for page in self._tables[row][: gone // self.page_length]:
            self._leave(page)
        del self._tables[row][: gone // self.page_length]
        self._used[row] -= gone
        self._forgotten[row] += gone

    def _make_room(self, row: int, count: int) -> None:
        """Pages for `count` tokens more, of which nobody else sees what is written to."""
        pages, used = self._tables[row], self._used[row]
        for i in range(used // self.page_length, len(pages)):
            if self._users[pages[i]] > 1:
                copy = self._take_page()
                for pool in self.buffers.tensors():
                    pool[copy] = pool[pages[i]]
                self._leave(pages[i])
                pages[i] = copy
        while len(pages) * self.page_length < used + count:
            pages.append(self._take_page())

    def _take_page(self) -> int:
        if not self._free:
            if self.pages is not None:
                raise ValueError(f"the cache is full: all of its {self.pages} pages are in use")
            self._grow(2 * len(self._users), self.keys[0])
        page = self._free.pop()
        self._users[page] = 1
        self._table = None
        return page

    def _leave(self, page: int) -> None:
        """One sequence less refers to this page."""
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)
        self._table = None

    def _make_pools(self, like: Tensor) -> None:
        if not self.keys:
            self._grow(self.batch if self.pages is None else self.pages, like)

    def _grow(self, pages: int, like: Tensor) -> None:
        """Pools of so many pages, the first time in the dtype of `like`."""
        shape = (pages, self.config.kv_heads, self.page_length, self.config.head_width)
        grown = Buffers.empty(self.config.layers, shape, like, self.dtype)
        old = len(self._users)
        for pool, before in zip(grown.tensors(), self.buffers.tensors(), strict=False):
            pool[:old] = before
        self.buffers = grown
        self._users += [0] * (pages - old)
        self._free += range(pages - 1, old - 1, -1)


def _side_by_side(pages: Tensor) -> Tensor:
    """(B, columns, G, L, ...) as (B, G, columns * L, ...)."""
    return pages.transpose(1, 2).flatten(2, 3)
