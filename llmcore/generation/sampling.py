"""How the next token is chosen from the logits.

All filters come down to the lowest logit that stays. Of what is left, a token is drawn along the
vocabulary: a number from [0, 1) is drawn, and the token is taken at which the running sum of the
probabilities passes it. Nothing is ever sorted but the few tokens that top_p is about. What a
sequence gets depends on its own logits and seed, not on the others in the batch.

This is numpy on one core: a row of logits is too short to wake the others for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Sums of blocks tell in which one the running sum passes the draw; a few of them cost no more than
# one sum of everything.
BLOCK = 256
# The nucleus is looked for among tokens at least this probable, to the best one's share: first
# among a few, in the end among all.
NUCLEUS_CUTS = (2**-6, 2**-12, 0.0)
# Float32 holds these temperatures' reciprocals.
COLDEST, HOTTEST = 1e-37, 1e37


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is set applies in this order, each to what the last left.

    repetition_penalty  above 1: logits of tokens that stand in the prompt or the answer are divided
                        by it where positive, else multiplied (Keskar et al. 2019); below 1 favours
    temperature  0: the most probable token; above: drawn from softmax(logits / temperature)
    top_k        only the k most probable tokens, and what is exactly as probable as the last
    top_p        only the most probable tokens that together reach the probability p, likewise
    min_p        only tokens at least min_p times as probable as the most probable one
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a number above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty}"
            )
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if filters and self.temperature == 0.0:
            raise ValueError(f"{filters[0]} chooses nothing at temperature 0: set a temperature")

    def choose(self, rows: np.ndarray, samplers: "Sequence[Sampler]") -> list[int]:
        """Logits (B, V), float32 -> the next token of B sequences, each by its own sampler.

        ValueError for a row with NaN or +inf, or of -inf only.
        """
        if self.repetition_penalty != 1.0:
            rows = np.stack([self._penalised(*pair) for pair in zip(rows, samplers, strict=True)])
        # The first of equals; NaN counts as the highest.
        tokens: list[int] = rows.argmax(axis=-1).tolist()
        best: list[float] = [row.item(token) for row, token in zip(rows, tokens, strict=True)]
        _check_best(best)
        if self.temperature > 0.0:
            # Numbers too large for float32 end as inf, which is what they are here.
            with np.errstate(over="ignore"):
                for b, (row, sampler) in enumerate(zip(rows, samplers, strict=True)):
                    tokens[b] = self._drawn(row, best[b], sampler.draw())
        if self.repetition_penalty != 1.0:
            for sampler, token in zip(samplers, tokens, strict=True):
                sampler.record(token)
        return tokens

    def _penalised(self, row: np.ndarray, sampler: "Sampler") -> np.ndarray:
        seen, row = sampler.seen, row.copy()  # the caller's stays what the model said
        logits = row[seen]
        penalty = np.float32(self.repetition_penalty)
        row[seen] = np.where(logits < 0, logits * penalty, logits / penalty)
        return row

    def _drawn(self, row: np.ndarray, best: float, draw: float) -> int:
        """The token of a row (V,), whose highest logit is `best`, at this place of [0, 1)."""
        lowest = self._lowest(row, best)
        if lowest == -np.inf:
            return _place(self._weights(row, best), draw)
        ids = np.flatnonzero(row >= lowest)
        return int(ids[_place(self._weights(row[ids], best), draw)])

    def _weights(self, logits: np.ndarray, best: float) -> np.ndarray:
        """How probable these are, to the best one's share."""
        # Differences first: what a tiny temperature makes of them is -inf at most, 0 for the best.
        weights = np.subtract(logits, best)
        weights *= np.float32(1.0 / min(max(self.temperature, COLDEST), HOTTEST))
        return np.exp(weights, out=weights)

    def _lowest(self, row: np.ndarray, best: float) -> float:
        """The lowest logit that the filters leave; -inf when that is all of them."""
        lowest = -np.inf
        if self.top_k is not None and self.top_k < len(row):
            lowest = _kth_highest(row, self.top_k)
        if self.top_p is not None and self.top_p < 1.0:
            left = row if lowest == -np.inf else row[row >= lowest]
            lowest = self._nucleus(left, best, self.top_p)
        if self.min_p:
            lowest = max(lowest, best + self.temperature * math.log(self.min_p))
        return lowest

    def _nucleus(self, logits: np.ndarray, best: float, top_p: float) -> float:
        """The lowest of the most probable ones that together reach this share of all."""
        weights = self._weights(logits, best)
        mass = top_p * weights.sum()
        for cut in NUCLEUS_CUTS:
            head = weights[weights >= cut]
            if head.sum() >= mass:
                break
        ranked = np.sort(head)[::-1]
        before = ranked.cumsum(dtype=np.float64) - ranked
        # A token stays if those before it haven't reached the mass: the best one always does.
        last = ranked[before.searchsorted(mass) - 1]
        return logits[weights >= last].min()


class Sampler:
    """What one sequence brings to the choice of its tokens: its own draws, and what it has said.

    It belongs to the sequence, whatever batch that is in and whichever place it has there.
    """

    def __init__(self, seed: int, prompt: Sequence[int] = ()) -> None:
        """prompt: the tokens before the first that is chosen."""
        self._seed = seed
        self._generator: torch.Generator | None = None  # kilobytes: made when it is needed
        self._seen = np.array(prompt, dtype=np.int64)
        self._count = len(prompt)

    @property
    def seen(self) -> np.ndarray:
        """(n,) the token ids of the prompt and of the answer so far."""
        return self._seen[: self._count]

    def draw(self) -> float:
        """A number in [0, 1)."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self._seed)
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def copy(self) -> "Sampler":
        """One that goes on from here in the same way: to look at draws before they are made."""
        twin = Sampler(self._seed)
        twin._seen, twin._count = self.seen.copy(), self._count
        if self._generator is not None:
            twin._generator = torch.Generator()
            twin._generator.set_state(self._generator.get_state())
        return twin

    def record(self, token: int) -> None:
        """This token was chosen."""
        if self._count == len(self._seen):
            self._seen = np.concatenate((self._seen, np.empty(self._count + 16, np.int64)))
        self._seen[self._count] = token
        self._count += 1


def samplers_of(
    prompts: Sequence[Sequence[int]], seed: int | Sequence[int] | None
) -> list[Sampler]:
    """One for each of B prompts; a seed of None comes from torch's global generator."""
    batch = len(prompts)
    if seed is None:
        seeds = [int(s) for s in torch.randint(2**62, (batch,))]
    elif isinstance(seed, int):
        seeds = [seed + b for b in range(batch)]
    else:
        seeds = list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{batch} sequences need {batch} seeds, got {len(seeds)}")
    return [Sampler(s, prompt) for s, prompt in zip(seeds, prompts, strict=True)]


def rows_of(logits: Tensor) -> np.ndarray:
    """Logits as float32 numbers on the CPU, as `Sampling` takes them: the same memory if it can."""
    return logits.float().numpy(force=True)


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """(K, V) -> log softmax(logits) of K tokens, in float32, nothing else applied."""
    places = torch.tensor(tokens, device=logits.device)[:, None]
    found: list[float] = logits.float().log_softmax(dim=-1).gather(1, places)[:, 0].tolist()
    return found


def _place(weights: np.ndarray, draw: float) -> int:
    """Where the running sum of the weights passes this share of them all."""
    start = 0
    if len(weights) > 2 * BLOCK:
        whole = len(weights) // BLOCK * BLOCK
        sums = weights[:whole].reshape(-1, BLOCK).sum(axis=1)
        block, draw = _passed(np.append(sums, weights[whole:].sum()), draw)
        start = block * BLOCK
        weights = weights[start : start + BLOCK]
    return start + _passed(weights, draw)[0]


def _passed(weights: np.ndarray, draw: float) -> tuple[int, float]:
    """Where their running sum passes this share of them all, and at which share of that one."""
    sums = weights.cumsum(dtype=np.float64)  # float32 would lose the rare ones
    target = min(draw * sums[-1], np.nextafter(sums[-1], 0.0))
    place = int(sums.searchsorted(target, side="right"))
    before = sums[place - 1] if place else 0.0
    return place, (target - before) / (sums[place] - before)


def _kth_highest(row: np.ndarray, k: int) -> float:
    """As sorting would find it, in a tenth of the time for a small k.

    Cut the row into columns: the k-th highest of their highest can't be above the k-th of all.
    """
    columns = len(row) // 64
    if k < columns:
        highest = row[: columns * 64].reshape(64, columns).max(axis=0)
        row = row[row >= np.partition(highest, -k)[-k]]
    return np.partition(row, -k)[-k]


def _check_best(best: Sequence[float]) -> None:
    """ValueError unless the highest logit of each row is finite (so the rest is too, or -inf)."""
    for row, value in enumerate(best):
        if not math.isfinite(value):
            raise ValueError(
                f"logits: the highest of sequence {row} is {value}; a finite number is needed to "
                "choose a token, and no NaN or inf beside it"
            )
