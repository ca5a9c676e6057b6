"""Batches out of tokens: an order that needs no memory, packed documents, padded sequences.

Training reads sample `place(position)` at `position`, a plain count of the samples read so far. The
count is the whole state of the order: a run that goes on, on as many processes as it likes, asks
for the same positions and gets the same samples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmcore.text.shards import Shards

IGNORED = -100
"""The target of a place where nothing is to be predicted."""

ROUNDS = 4


class Order:
    """A new permutation of `count` samples in every epoch, a pure function of the seed.

    A Feistel network permutes the numbers of as many bits as `count` needs; where it leads outside,
    it is walked on until it is back inside (Black and Rogaway 2002).
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"there must be at least one sample, got {count}")
        self.count, self.seed = count, seed
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._epoch, self._keys = -1, [0] * ROUNDS

    def place(self, position: int) -> int:
        """The sample, 0 to count - 1, that is read at this position, from 0 on."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            text = f"{self.seed}:{epoch}".encode()
            digest = hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()
            self._keys = np.frombuffer(digest, "<u8").tolist()
            self._epoch = epoch
        place = self._permuted(place)
        while place >= self.count:
            place = self._permuted(place)
        return place

    def _permuted(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half | right


def _mixed(value: int) -> int:
    """All of 64 bits depend on all (the finaliser of splitmix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


@dataclass(frozen=True)
class Batch:
    """What a model is given for one pass, and by what its loss is counted.

    inputs   tensors by the names of the objective's arguments
    targets  tokens to predict: a loss is a sum over them, divided by their number in a whole step
    tokens   tokens read, for the speed
    """

    inputs: dict[str, Tensor]
    targets: int
    tokens: int


@dataclass
class Packed:
    """Rows of `length` tokens, cut from the stream of all documents one behind the other.

    No token is padding. With `separate` a batch tells where documents begin, so that each sees
    itself only; what a row's cut takes away from a document is its context, never a target.
    """

    shards: Shards
    length: int
    rows: int
    seed: int = 0
    separate: bool = True
    _order: Order = field(init=False)

    def __post_init__(self) -> None:
        count = (len(self.shards) - 1) // self.length
        if count < 1:
            raise ValueError(
                f"rows of {self.length} tokens need {self.length + 1}, there are {len(self.shards)}"
            )
        self._order = Order(count, self.seed)

    @property
    def tokens(self) -> int:
        """Targets of one epoch."""
        return self._order.count * self.length

    @property
    def batches(self) -> int:
        """Whole batches of one epoch."""
        return self._order.count // self.rows

    def batch(self, position: int) -> Batch:
        """Batch number `position`: ids and targets (rows, length), and cu_seqlens (documents + 1)
        where documents begin in the rows, one row behind the other."""
        length = self.length
        places = [self._order.place(position * self.rows + i) * length for i in range(self.rows)]
        read = torch.from_numpy(np.stack([self.shards.read(p, p + length + 1) for p in places]))
        inputs = {"ids": read[:, :-1].contiguous(), "targets": read[:, 1:].contiguous()}
        if self.separate:
            inputs["cu_seqlens"] = self._cuts(places)
        return Batch(inputs, self.rows * length, self.rows * length)

    def _cuts(self, places: Sequence[int]) -> Tensor:
        cuts = []
        for row, place in enumerate(places):
            first, last = np.searchsorted(self.shards.starts, (place + 1, place + self.length))
            starts = np.concatenate(([place], self.shards.starts[first:last]))
            cuts.append(starts - place + row * self.length)
        cuts.append(np.array([len(places) * self.length]))
        return torch.from_numpy(np.concatenate(cuts)).to(torch.int32)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one (N, T) int64, filled up behind with `value`."""
    if not rows:
        raise ValueError("there must be at least one row")
    found = torch.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return found


def length_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Sample numbers in batches of like lengths, each of at most `tokens` with its padding.

    A sample that is longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    # Batches are cut from the longest down, so that a batch's first one says its width.
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass
class Translations:
    """Pairs of token ids, padded on the right, in batches of like lengths.

    pairs     (source, target) without special tokens
    tokens    of a batch's longer side at most, padding included
    start, end, pad   ids; a target begins with start (which nobody predicts) and ends with end,
                      and so does a source
    """

    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    tokens: int
    start: int
    end: int
    pad: int
    seed: int = 0
    _order: Order = field(init=False)

    def __post_init__(self) -> None:
        lengths = [max(len(source), len(target)) + 1 for source, target in self.pairs]
        self._batches = length_batches(lengths, self.tokens)
        self._order = Order(len(self._batches), self.seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._batches)

    def batch(self, position: int) -> Batch:
        """Batch number `position`: source_ids and source_mask (B, S), target_ids and targets (B, T)
        with IGNORED where the target is padding."""
        chosen = [self.pairs[i] for i in self._batches[self._order.place(position)]]
        sources = [[*source, self.end] for source, _ in chosen]
        targets = [[*target, self.end] for _, target in chosen]
        source_ids = pad(sources, self.pad)
        widths = torch.tensor([len(source) for source in sources])
        inputs = {
            "source_ids": source_ids,
            "source_mask": torch.arange(source_ids.shape[1]) < widths[:, None],
            "target_ids": pad([[self.start, *target] for _, target in chosen], self.pad),
            "targets": pad(targets, IGNORED),
        }
        read = sum(map(len, sources)) + sum(map(len, targets))
        return Batch(inputs, sum(map(len, targets)), read)
