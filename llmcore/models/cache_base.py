"""What all kinds of key/value cache are to a decoder: sequences, of which each has a length.

It is for inference: no gradient goes back through the buffers. A forward pass makes room once, lets
every layer store and attend, and commits at its end; a pass that fails half-way leaves the cache as
it was.

Where the model's attention has a window, keys that no query can see any more are forgotten, by
whole chunks of the attention kernels. So every sum over keys is still taken in the order that it
has without forgetting, and gives the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import TransformerConfig
from llmcore.models.kv_buffers import STORED, Buffers, StoredDtype, check_dtype

# KEY_CHUNK of csrc/cpu/attention_keys.h: partial softmaxes restart at its multiples.
KEY_CHUNK = 512


@dataclass(frozen=True)
class Span:
    """Where the T new tokens of one forward pass go.

    first       int or, when the sequences have different lengths, (B,) int64: the position of the
                first new token
    new         T
    kv_lengths  (B,) int64: slots of each sequence with the new tokens; None when all are `end`
    q_offset    int or (B,): the slot of the first new token
    end         slots in use after the pass, over all sequences
    """

    first: int | Tensor
    new: int
    kv_lengths: Tensor | None
    q_offset: int | Tensor
    end: int
    device: torch.device

    @property
    def positions(self) -> Tensor:
        """(T,), or (B, T) as `first` is, int64."""
        steps = torch.arange(self.new, device=self.device)
        return steps + (self.first if isinstance(self.first, int) else self.first[:, None])


@dataclass(frozen=True)
class Source:
    """What cross-attention sees of B source texts, whatever the number of tokens after them.

    keys, values  of each layer, (B, G, S, D)
    lengths       (B,) int64: the source's own among S; None when all are S
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor | None = None

    def select(self, rows: Tensor) -> "Source":
        """Only these sources, (K,) int64 indices, in this order."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return Source([k[rows] for k in self.keys], [v[rows] for v in self.values], lengths)

    def take(self, row: int) -> "Source":
        """One of these, as long as it is."""
        end = None if self.lengths is None else int(self.lengths[row])
        keys, values = (
            [tensor[row : row + 1, :, :end] for tensor in tensors]
            for tensors in (self.keys, self.values)
        )
        return Source(keys, values)

    def put(self, row: int, other: "Source") -> "Source":
        """These with another's only source in the place of one of them."""
        length = other.keys[0].shape[2]
        kept = self._grown(length)
        for ours, new in zip((*kept.keys, *kept.values), (*other.keys, *other.values), strict=True):
            ours[row, :, :length] = new[0]
        assert kept.lengths is not None
        kept.lengths[row] = length
        return kept

    @classmethod
    def empty(cls, batch: int, like: "Source") -> "Source":
        """Room for `batch` sources of the size of the one that `like` is, without any yet."""
        keys, values = (
            [tensor.new_zeros(batch, *tensor.shape[1:]) for tensor in tensors]
            for tensors in (like.keys, like.values)
        )
        return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=keys[0].device))

    def _grown(self, length: int) -> "Source":
        """These with room for `length` tokens each."""
        more = length - self.keys[0].shape[2]
        if more <= 0 and self.lengths is not None:
            return self
        keys, values = (
            [torch.cat((t, t.new_zeros(*t.shape[:2], max(0, more), t.shape[3])), 2) for t in x]
            for x in (self.keys, self.values)
        )
        full = torch.full((len(keys[0]),), self.keys[0].shape[2], device=keys[0].device)
        return Source(keys, values, full if self.lengths is None else self.lengths)


@dataclass(frozen=True)
class Kept:
    """What a cache holds of one sequence: keys and values (G, n, D), scales (G, n).

    first   the position of the first of the n tokens: above 0 where a window let others go
    source  what it is conditioned on
    """

    buffers: Buffers
    first: int = 0
    source: Source | None = None

    @property
    def length(self) -> int:
        """Tokens of the sequence, forgotten ones included."""
        return self.first + self.buffers.keys[0].shape[1]

    def head(self, length: int) -> "Kept":
        """The sequence's first `length` tokens, as views; `first` must be 0."""
        assert self.first == 0
        return Kept(self.buffers.map(lambda tensor: tensor[:, :length]))

    def copy(self) -> "Kept":
        """The same in memory of its own, no more than it needs."""
        return Kept(
            self.buffers.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format)),
            self.first,
        )


class Cache(ABC):
    """What the kinds of cache have in common: B sequences, of which each has a length."""

    def __init__(
        self, config: TransformerConfig, batch: int, dtype: StoredDtype | None = None
    ) -> None:
        check_dtype(dtype)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.config = config
        self.batch = batch
        self.dtype = dtype
        self.buffers = Buffers()
        self.plan: Any = None  # of the native pass that fills it: models/plan.py
        self.source: Source | None = None  # of a decoder with cross-attention
        self._used = [0] * batch  # slots of each sequence
        self._forgotten = [0] * batch  # tokens of each sequence that have no slot any more

    @property
    def keys(self) -> list[Tensor]:
        return self.buffers.keys

    @property
    def values(self) -> list[Tensor]:
        return self.buffers.values

    @property
    def device(self) -> torch.device | None:
        """Where its tokens are; None before the first pass."""
        return self.keys[0].device if self.keys else None

    @property
    def counts(self) -> list[int]:
        """The tokens of each sequence."""
        return [n + m for n, m in zip(self._used, self._forgotten, strict=True)]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, the tokens of each sequence."""
        return torch.tensor(self.counts)

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.counts, default=0)

    @abstractmethod
    def reserve(self, new: int, like: Tensor, counts: Tensor | None) -> Span:
        """Room for the new tokens of a pass, T = `new` of each sequence.

        like    (B, ...): of the dtype that keys and values are computed in, and where they are
        counts  (B,) int64: how many of the T belong to each sequence (the first ones); None = all

        ValueError for another batch, more tokens than the model's context, or a cache that is full.
        """

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor, span: Span) -> None:
        """Put the new tokens' k and v (B, G, T, D) into `layer`."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, span: Span, options: dict[str, Any]) -> Tensor:
        """Attention of the new tokens' queries (B, H, T, D) to all that `layer` holds, as q.

        options  those of ops.attention that are the model's own: window, scale, softcap ...
        """

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences, (K,) int64 indices, in this order; one may come repeatedly."""
        wanted = rows.tolist()
        self._select(wanted)
        if self.source is not None:
            self.source = self.source.select(rows)
        self.batch = len(wanted)
        self._used = [self._used[row] for row in wanted]
        self._forgotten = [self._forgotten[row] for row in wanted]

    @abstractmethod
    def _select(self, rows: list[int]) -> None:
        """`select`, as far as keys and values go."""

    def take(self, row: int) -> Kept:
        """What the cache holds of a sequence, valid until the cache next changes."""
        source = None if self.source is None else self.source.take(row)
        return Kept(self._take(row), self._forgotten[row], source)

    @abstractmethod
    def _take(self, row: int) -> Buffers:
        """The keys and values of a sequence."""

    def put(self, row: int, kept: Kept) -> None:
        """Forget a sequence and continue from another one's tokens in its place."""
        self._check_kept(kept)
        self._used[row] = self._forgotten[row] = 0
        length = kept.length - kept.first
        self._put(row, kept.buffers, length)
        self._used[row], self._forgotten[row] = length, kept.first
        if kept.source is not None:
            old = self.source or Source.empty(self.batch, kept.source)
            self.source = old.put(row, kept.source)

    @abstractmethod
    def _put(self, row: int, buffers: Buffers, length: int) -> None:
        """Hold this sequence's keys and values in the place of what was there."""

    def commit(self, span: Span) -> None:
        """The pass is through: its tokens now count."""
        if span.kv_lengths is None:
            self._used = [span.end] * self.batch
        else:
            self._used = span.kv_lengths.tolist()

    def shortest(self, row: int) -> int:
        """The fewest tokens, apart from none, that a sequence can be cut back to."""
        forgotten, window = self._forgotten[row], self.config.horizon
        return 0 if window is None or forgotten == 0 else forgotten + window - 1

    def truncate(self, lengths: Sequence[int] | Tensor) -> None:
        """Keep only the first `lengths[b]` tokens of each sequence.

        ValueError when a sequence has fewer, or a window has let go of what the next token of so
        short a sequence would see. (Back to where the last pass started is always possible.)
        """
        wanted = [int(n) for n in lengths]
        if len(wanted) != self.batch:
            raise ValueError(f"lengths: expected {self.batch} numbers, got {len(wanted)}")
        for row, (length, count) in enumerate(zip(wanted, self.counts, strict=True)):
            if not 0 <= length <= count:
                raise ValueError(f"lengths: sequence {row} has {count} tokens, got {length}")
            if 0 < length < self.shortest(row):
                raise ValueError(
                    f"lengths: the window has forgotten {self._forgotten[row]} tokens of sequence "
                    f"{row}, which can't be continued after {length}"
                )
        for row, length in enumerate(wanted):
            self._forgotten[row] = self._forgotten[row] if length else 0
            self._used[row] = length - self._forgotten[row]

    def _first_seen(self, position: int) -> int:
        """The first position that a token at this one, or a later one, may see."""
        window = self.config.horizon
        return 0 if window is None else max(0, position + 1 - window)

    def _unseen(self, row: int, unit: int) -> int:
        """The slots of a sequence that no new token will see: whole units from the first on."""
        forgotten = self._forgotten[row]
        unseen = self._first_seen(self._used[row] + forgotten) - forgotten
        return max(0, unseen) // unit * unit

    def _check(self, batch: int, new: int) -> None:
        if batch != self.batch:
            raise ValueError(f"this cache holds {self.batch} sequences, got ids of {batch}")
        if len(self) + new > self.config.context_length:
            raise ValueError(
                f"{len(self)} tokens in the cache and {new} new ones "
                f"exceed the context length of {self.config.context_length}"
            )

    def _check_kept(self, kept: Kept) -> None:
        if self.config.horizon is None and kept.first > 0:
            raise ValueError(f"kept: its first {kept.first} tokens are missing")
        layers, found = len(kept.buffers.keys), kept.buffers.keys[0].dtype
        expected = self.keys[0].dtype if self.keys else STORED.get(self.dtype, found)
        if (layers, found) != (self.config.layers, expected):
            raise ValueError(
                f"kept: {layers} layers of {found} don't fit a cache of {self.config.layers} "
                f"layers of {expected}"
            )
