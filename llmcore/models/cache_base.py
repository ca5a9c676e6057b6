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

    positions   (T,) or, when the sequences have different lengths, (B, T); int64
    kv_lengths  (B,) int64: slots of each sequence with the new tokens; None when all are `end`
    q_offset    int or (B,): the slot of the first new token
    end         slots in use after the pass, over all sequences
    """

    positions: Tensor
    kv_lengths: Tensor | None
    q_offset: int | Tensor
    end: int


@dataclass(frozen=True)
class Kept:
    """What a cache holds of one sequence: keys and values (G, n, D), scales (G, n).

    first  the position of the first of the n tokens: above 0 where a window let others go
    """

    buffers: Buffers
    first: int = 0

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
        self._used = [0] * batch  # slots of each sequence
        self._forgotten = [0] * batch  # tokens of each sequence that have no slot any more

    @property
    def keys(self) -> list[Tensor]:
        return self.buffers.keys

    @property
    def values(self) -> list[Tensor]:
        return self.buffers.values

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
    def reserve(self, like: Tensor, counts: Tensor | None) -> Span:
        """Room for the new tokens of a pass.

        like    (B, T, C): the new tokens' vectors; gives T, dtype and device
        counts  (B,) int64: how many of the T belong to each sequence (the first ones); None = all

        ValueError for another batch, more tokens than the model's context, or a cache that is full.
        """

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor, span: Span) -> None:
        """Put the new tokens' k and v (B, G, T, D) into `layer`."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, span: Span) -> Tensor:
        """Attention of the new tokens' queries (B, H, T, D) to all that `layer` holds, as q."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep only these sequences, (K,) int64 indices, in this order; one may come repeatedly."""

    @abstractmethod
    def take(self, row: int) -> Kept:
        """What the cache holds of a sequence, valid until the cache next changes."""

    @abstractmethod
    def put(self, row: int, kept: Kept) -> None:
        """Forget a sequence and continue from another one's tokens in its place."""

    def commit(self, span: Span) -> None:
        """The pass is through: its tokens now count."""
        if span.kv_lengths is None:
            self._used = [span.end] * self.batch
        else:
            self._used = span.kv_lengths.tolist()

    def shortest(self, row: int) -> int:
        """The fewest tokens, apart from none, that a sequence can be cut back to."""
        forgotten, window = self._forgotten[row], self.config.window
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
        window = self.config.window
        return 0 if window is None else max(0, position + 1 - window)

    def _unseen(self, row: int, unit: int) -> int:
        """The slots of a sequence that no new token will see: whole units from the first on."""
        forgotten = self._forgotten[row]
        unseen = self._first_seen(self._used[row] + forgotten) - forgotten
        return max(0, unseen) // unit * unit

    def _check(self, like: Tensor) -> None:
        batch, new = like.shape[:2]
        if batch != self.batch:
            raise ValueError(f"this cache holds {self.batch} sequences, got ids of {batch}")
        if len(self) + new > self.config.context_length:
            raise ValueError(
                f"{len(self)} tokens in the cache and {new} new ones "
                f"exceed the context length of {self.config.context_length}"
            )

    def _check_kept(self, kept: Kept) -> None:
        if self.config.window is None and kept.first > 0:
            raise ValueError(f"kept: its first {kept.first} tokens are missing")
        layers, found = len(kept.buffers.keys), kept.buffers.keys[0].dtype
        expected = self.keys[0].dtype if self.keys else STORED.get(self.dtype, found)
        if (layers, found) != (self.config.layers, expected):
            raise ValueError(
                f"kept: {layers} layers of {found} don't fit a cache of {self.config.layers} "
                f"layers of {expected}"
            )
