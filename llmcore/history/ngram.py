"""The n-gram: the next token by how often it followed the last n - 1, counted in a text.

Most runs of n tokens never occur, so every order leans on the next lower one (interpolated modified
Kneser-Ney smoothing; Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128):

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p(w | h without its first token)
    g(h)     = (D1 N1(h) + D2 N2(h) + D3 N3(h)) / c(h)

c counts in the highest order how often h w occurs; in lower ones how many different tokens stand
before it (or how often it begins a document), since that is what is asked for there: in how many
new places w may turn up. Nk(h) is how many w have the count k after h (N3: 3 or more), the
discounts D1, D2, D3 come from how many n-grams occur once, twice, three and four times. The lowest
order leans on 1/V.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from llmcore import ops


@dataclass(frozen=True)
class NgramConfig:
    """order n (1: no context), vocabulary V, and the token that begins each document."""

    order: int
    vocab_size: int
    separator: int
    context_length: int = 1 << 30

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")
        if self.vocab_size**self.order >= 1 << 63:
            raise ValueError(
                f"order {self.order} of {self.vocab_size} tokens has more n-grams than 64 bits hold"
            )


@dataclass
class _Level:
    """One order: contexts in the order of their keys, and behind each the tokens seen there.

    keys    (K,) int64: a context's tokens as the digits of a number
    first   (K + 1,) int64: where a context's tokens begin in the next two
    tokens  (N,) int64;  shares (N,) float64: max(c - D, 0) / c(h)
    lean    (K,) float64: g
    """

    keys: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    shares: np.ndarray
    lean: np.ndarray


class Ngram(nn.Module):
    """Interpolated modified Kneser-Ney. It has no parameters: it is counted, not trained."""

    def __init__(self, config: NgramConfig, tokens: np.ndarray) -> None:
        """tokens (N,): documents one behind the other, each begun by the separator."""
        super().__init__()
        self.config = config
        tokens = np.asarray(tokens, np.int64)
        since = _since_separator(tokens[None], config.separator)[0]
        self._levels = [self._count(tokens, since, order) for order in range(1, config.order + 1)]

    def forward(self, ids: Tensor) -> Tensor:
        """log p (B, T, V), float32, of the token behind each of ids (B, T)."""
        rows = ids.detach().cpu().numpy()
        since = _since_separator(rows, self.config.separator)
        result = np.stack([self._row(row, s) for row, s in zip(rows, since, strict=True)])
        return torch.from_numpy(np.log(result)).float()

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """As every language model's here. Documents are told by their separators."""
        logits = self(ids)
        return ops.cross_entropy(
            logits, targets, label_smoothing=label_smoothing, reduction=reduction
        )

    def _count(self, tokens: np.ndarray, since: np.ndarray, order: int) -> _Level:
        base = self.config.vocab_size
        grams = _runs(tokens, order, base)
        # A run lies inside of one document when its last token has so many before it.
        inside = since[order - 1 :] >= order - 1
        if order == self.config.order:
            keys, counts = np.unique(grams[inside], return_counts=True)
        else:
            # How many tokens stand before it: runs that are one longer, each once. What begins a
            # document has none before it, and counts as often as it occurs.
            longer = np.unique(_runs(tokens, order + 1, base)[since[order:] >= order])
            begins = inside & (tokens[: len(grams)] == self.config.separator) & (order > 1)
            keys, counts = np.unique(
                np.concatenate((longer % base**order, grams[begins])), return_counts=True
            )
        return _smoothed(keys // base, keys % base, counts)

    def _row(self, ids: np.ndarray, since: np.ndarray) -> np.ndarray:
        """p (T, V), float64."""
        base = self.config.vocab_size
        p = np.full((len(ids), base), 1.0 / base)
        for order, level in enumerate(self._levels, 1):
            places = np.arange(order - 2, len(ids)) if order > 1 else np.arange(len(ids))
            keys = _runs(ids, order - 1, base) if order > 1 else np.zeros(len(ids), np.int64)
            at = np.searchsorted(level.keys, keys)
            known = at < len(level.keys)
            known[known] = level.keys[at[known]] == keys[known]
            known &= since[places] >= order - 2
            rows, at = places[known], at[known]
            p[rows] *= level.lean[at, None]
            lengths = level.first[at + 1] - level.first[at]
            # The entries of all contexts, one context behind the other.
            within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
            entries = np.repeat(level.first[at], lengths) + within
            p[np.repeat(rows, lengths), level.tokens[entries]] += level.shares[entries]
        return p


def _since_separator(rows: np.ndarray, separator: int) -> np.ndarray:
    """For each token how many stand before it in its row and its document."""
    places = np.arange(rows.shape[1])
    begins = np.where(rows == separator, places, 0)
    return places - np.maximum.accumulate(begins, axis=1)


def _runs(tokens: np.ndarray, length: int, base: int) -> np.ndarray:
    """All runs of `length` tokens as numbers in base V, the last token the lowest digit."""
    count = max(0, len(tokens) - length + 1)
    keys = np.zeros(count, np.int64)
    for i in range(length):
        keys = keys * base + tokens[i : i + count]
    return keys


def _smoothed(contexts: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> _Level:
    """The level of n-grams that are sorted by context, then token."""
    keys, first = np.unique(contexts, return_index=True)
    first = np.append(first, len(contexts))
    n = np.array([(counts == k).sum() for k in (1, 2, 3, 4)], np.float64)
    discounts = np.array([0.0, 0.0, 0.0, 0.0])
    if n.all():
        y = n[0] / (n[0] + 2 * n[1])
        discounts[1:] = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
    if not (discounts[1:] > 0.0).all():  # too little text to tell
        discounts[1:] = 0.5
    taken = discounts[np.minimum(counts, 3)]
    total = np.add.reduceat(counts, first[:-1]).astype(np.float64)
    lean = np.add.reduceat(taken, first[:-1]) / total
    shares = (counts - taken) / np.repeat(total, np.diff(first))
    return _Level(keys, first, tokens, shares, lean)
