"""Batches for BERT's two tasks: tokens that are hidden, and pairs of runs that belong together.

    <|cls|> A <|sep|> B <|sep|>      B follows A in the document, or comes from another one (half)

Of the tokens of A and B, 15 % are to be told; of these 80 % are hidden behind <|mask|>, 10 % are
another token and 10 % are left (Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1).
What is hidden depends on the seed and the position only, and is new in every epoch.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from llmcore.text.data import IGNORED, Batch, Order, pad
from llmcore.text.shards import Shards
from llmcore.text.tokenizer import Tokenizer

CLS, SEP, MASK = "<|cls|>", "<|sep|>", "<|mask|>"
SPECIAL = (CLS, SEP, MASK)
SHARE, HIDDEN, CHANGED = 0.15, 0.8, 0.1
SHORTEST = 8
"""Tokens of the two runs of a pair: what is shorter says too little."""


class _Row(NamedTuple):
    ids: list[int]
    types: list[int]
    targets: list[int]
    is_next: int


@dataclass
class MaskedPairs:
    """Rows of at most `length` tokens, special ones among them."""

    shards: Shards
    tokenizer: Tokenizer
    length: int
    rows: int
    seed: int = 0
    _order: Order = field(init=False)

    def __post_init__(self) -> None:
        """ValueError when the tokenizer lacks a special token, or rows have no room."""
        lacking = [token for token in SPECIAL if token not in self.tokenizer.special]
        if lacking:
            raise ValueError(f"the tokenizer has no {', '.join(lacking)}")
        room = self.length - 3
        if room < SHORTEST:
            raise ValueError(f"length must be at least {SHORTEST + 3}, got {self.length}")
        ends = np.append(self.shards.starts[1:], len(self.shards))
        self._runs = [  # where both runs begin and end, and in which document they are
            (start, min(start + room, end), number)
            for number, (first, end) in enumerate(zip(self.shards.starts + 1, ends, strict=True))
            for start in range(first, end - SHORTEST + 1, room)
        ]
        self._order = Order(len(self._runs), self.seed)

    @property
    def batches(self) -> int:
        """Whole batches of one epoch."""
        return len(self._runs) // self.rows

    def batch(self, position: int) -> Batch:
        """ids, token_types (B, T) int64, attention_mask (B, T) bool, targets (B, T) with IGNORED
        where nothing is hidden, is_next (B,) int64."""
        rows = [self._row(position * self.rows + i) for i in range(self.rows)]
        ids = pad([row.ids for row in rows], self.tokenizer.pad_id or 0)
        targets = pad([row.targets for row in rows], IGNORED)
        widths = torch.tensor([len(row.ids) for row in rows])
        inputs = {
            "ids": ids,
            "token_types": pad([row.types for row in rows], 0),
            "attention_mask": torch.arange(ids.shape[1]) < widths[:, None],
            "targets": targets,
            "is_next": torch.tensor([row.is_next for row in rows]),
        }
        return Batch(inputs, int((targets != IGNORED).sum()), int(widths.sum()))

    def _row(self, position: int) -> "_Row":
        draw = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        start, end, document = self._runs[self._order.place(position)]
        middle = (start + end) // 2
        first, second = self.shards.read(start, middle), self.shards.read(middle, end)
        is_next = int(draw.random() < 0.5)
        if not is_next:
            second, is_next = self._other(draw, document, second)
        special = self.tokenizer.special
        ids = np.concatenate(([special[CLS]], first, [special[SEP]], second, [special[SEP]]))
        types = np.repeat((0, 1), (len(first) + 2, len(second) + 1))
        hidden, targets = self._hide(draw, ids)
        return _Row(hidden.tolist(), types.tolist(), targets.tolist(), is_next)

    def _other(
        self, draw: np.random.Generator, document: int, second: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """The second half of another document's runs; the own one where there is no other."""
        for _ in range(10):
            start, end, other = self._runs[int(draw.integers(len(self._runs)))]
            if other != document:
                return self.shards.read((start + end) // 2, end), 0
        return second, 1

    def _hide(self, draw: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        special = list(self.tokenizer.special.values())
        plain = np.flatnonzero(~np.isin(ids, special))
        # At least one, so that no row teaches nothing.
        count = max(1, round(SHARE * len(plain)))
        chosen = draw.choice(plain, count, replace=False)
        targets = np.full(len(ids), IGNORED)
        targets[chosen] = ids[chosen]
        kind = draw.random(count)
        hidden = ids.copy()
        hidden[chosen[kind < HIDDEN]] = self.tokenizer.special[MASK]
        changed = chosen[(kind >= HIDDEN) & (kind < HIDDEN + CHANGED)]
        known = np.setdiff1d(np.arange(len(self.tokenizer)), special)
        hidden[changed] = draw.choice(known, len(changed))
        return hidden, targets
