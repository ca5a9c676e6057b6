"""How the next token is chosen from the logits.

A token is drawn along the ranks: the tokens stand in the order of their probability, a number from
[0, 1) is drawn, and the token is taken at which the running sum of the probabilities passes it. All
filters keep a head of that order, so that nearly always a few of the best tokens are all it takes;
the whole vocabulary is never sorted. What a sequence gets depends on its own logits and seed, not
on the others in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmcore import ops

# Ranks looked at first, and how many times more where they don't settle it. On a Zen 4 core the 32
# best of 49,152 take 40 us, the 1,024 best 110 us, sorting all of them 3.8 ms.
FIRST_RANKS = 32
MORE_RANKS = 32
# Logits in a block: finding the best blocks first is what makes the best tokens cheap to find.
BLOCK = 64
# Float32 holds these temperatures and their reciprocals.
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

    def choose(self, logits: Tensor, samplers: "Sequence[Sampler]") -> Tensor:
        """(B, V) -> (B,) int64: the next token of B sequences, each by its own sampler.

        ValueError for a row with NaN or +inf, or of -inf only.
        """
        logits = logits.float()
        if self.repetition_penalty == 1.0:
            return self._chosen(logits, samplers)
        tokens = self._chosen(self._penalised(logits, samplers), samplers)
        for sampler, token in zip(samplers, tokens.tolist(), strict=True):
            sampler.record(token)
        return tokens

    def _chosen(self, logits: Tensor, samplers: "Sequence[Sampler]") -> Tensor:
        if self.temperature == 0.0:
            best, tokens = highest(logits, 1)
            _check_best(best)
            return tokens[:, 0]
        if self._needs_all:
            best = logits.amax(dim=-1, keepdim=True)
            _check_best(best)
            # Differences first: what is divided by a tiny temperature overflows to -inf at most,
            # never in the best token.
            logits = logits - best
            ops.masked_softmax(logits, scale=1.0 / self._temperature, out=logits)
        draws = [sampler.draw() for sampler in samplers]
        return torch.tensor(self._drawn(logits, draws), device=logits.device)

    def _penalised(self, logits: Tensor, samplers: "Sequence[Sampler]") -> Tensor:
        logits = logits.clone()  # the caller's stay what the model said
        for row, sampler in zip(logits, samplers, strict=True):
            seen = sampler.seen.to(row.device)
            scores = row[seen]
            row[seen] = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
        return logits

    def _drawn(self, scores: Tensor, draws: list[float]) -> list[int]:
        """scores (B, V), a draw for each row -> its token, from as few ranks as settle it."""
        size = scores.shape[-1]
        tokens = [-1] * len(draws)
        rows = list(range(len(draws)))
        count = max(FIRST_RANKS, self.top_k + 1 if self.top_k is not None else 0)
        while rows:
            left = scores if len(rows) == len(scores) else scores[rows]
            best, ids = highest(left, min(count, size))
            _check_best(best)
            ranked = best.cpu().numpy()
            unsettled = []
            for place, row in enumerate(rows):
                rank = self._rank(ranked[place], draws[row], is_all=count >= size)
                if rank is None:
                    unsettled.append(row)
                else:
                    tokens[row] = int(ids[place, rank])
            rows = unsettled
            count *= MORE_RANKS
        return tokens

    def _rank(self, ranked: np.ndarray, draw: float, *, is_all: bool) -> int | None:
        """The drawn rank, 0 the best, of scores that stand best first.

        None where the ranks behind these count as well; is_all: there are none.
        """
        weights = ranked.astype(np.float64)  # running sums in float32 would lose the rare tokens
        if not self._needs_all:
            weights = np.exp((weights - weights[0]) / self._temperature)
        kept = self._kept(ranked, weights)
        if kept == len(ranked) and self._filters and not is_all:
            return None
        sums = weights[:kept].cumsum()
        total = sums[-1] if self._filters or is_all else 1.0
        rank = int(sums.searchsorted(min(draw * total, np.nextafter(total, 0.0)), side="right"))
        return rank if rank < kept else None

    def _kept(self, ranked: np.ndarray, weights: np.ndarray) -> int:
        """How many of the best tokens the filters leave.

        The equals of the last one stay too, so that the order of equals decides nothing.
        """
        kept = len(ranked)
        if self.top_k is not None and self.top_k < kept:
            kept = _not_below(ranked[self.top_k - 1], ranked)
        if self._top_p is not None:
            sums = weights[:kept].cumsum()
            total = 1.0 if self._needs_all else sums[-1]
            # A token stays if those before it haven't reached top_p: the best one always does.
            last = int((sums - weights[:kept]).searchsorted(self._top_p * total)) - 1
            kept = _not_below(ranked[last], ranked[:kept])
        if self.min_p:
            kept = min(kept, _not_below(self.min_p * weights[0], weights))
        return kept

    @property
    def _filters(self) -> bool:
        return self.top_k is not None or self._top_p is not None or bool(self.min_p)

    @property
    def _needs_all(self) -> bool:
        """Whether the probability of a token depends on all others, or on the kept ones only."""
        return self.top_k is None and (self._top_p is not None or not self.min_p)

    @property
    def _top_p(self) -> float | None:
        return None if self.top_p == 1.0 else self.top_p

    @property
    def _temperature(self) -> float:
        return min(max(self.temperature, COLDEST), HOTTEST)


class Sampler:
    """What one sequence brings to the choice of its tokens: its own draws, and what it has said.

    It belongs to the sequence, whatever batch that is in and whichever place it has there.
    """

    def __init__(self, seed: int, prompt: Sequence[int] = ()) -> None:
        """prompt: the tokens before the first that is chosen."""
        self._seed = seed
        self._generator: torch.Generator | None = None  # kilobytes: made when it is needed
        self._seen = torch.tensor(prompt, dtype=torch.int64)
        self._count = len(prompt)

    @property
    def seen(self) -> Tensor:
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
        twin._seen, twin._count = self.seen.clone(), self._count
        if self._generator is not None:
            twin._generator = torch.Generator()
            twin._generator.set_state(self._generator.get_state())
        return twin

    def record(self, token: int) -> None:
        """This token was chosen."""
        if self._count == len(self._seen):
            self._seen = torch.cat((self._seen, self._seen.new_empty(self._count + 16)))
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


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """(K, V), (K,) -> (K,) float32: log softmax(logits) of these tokens, nothing else applied."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


def highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """values (B, V) -> the `count` highest of each row and their indices, (B, count), best first.

    As topk, in a half to a quarter of its time: a block whose best value isn't among the `count`
    best ones of all blocks needn't be looked at. For count 1, equals are settled as by argmax.
    """
    blocks = values.shape[-1] // BLOCK
    if blocks < 4 * count:
        return _top(values, count)
    rest = blocks * BLOCK
    whole = values[:, :rest].unflatten(-1, (blocks, BLOCK))
    _, chosen = _top(whole.amax(dim=-1), count)
    pairs = zip(whole, chosen, strict=True)
    found = torch.stack([row.index_select(0, blocks) for row, blocks in pairs]).flatten(1)
    if rest < values.shape[-1]:  # as one more block, of its own length
        found = torch.cat((found, values[:, rest:]), dim=1)
        chosen = torch.cat((chosen, chosen.new_full((len(chosen), 1), blocks)), dim=1)
    best, places = _top(found, count)
    return best, chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == 1:
        return values.max(dim=-1, keepdim=True)
    if count == values.shape[-1]:
        return values.sort(dim=-1, descending=True, stable=True)
    return values.topk(count, dim=-1)


def _not_below(lowest: float, descending: np.ndarray) -> int:
    """How many of these numbers are at least `lowest`."""
    return len(descending) - int(descending[::-1].searchsorted(lowest))


def _check_best(best: Tensor) -> None:
    """ValueError unless the highest logit of each row is finite (so the rest is too, or -inf)."""
    for row, value in enumerate(best[:, 0].tolist()):
        if not math.isfinite(value):
            raise ValueError(
                f"logits: the highest of sequence {row} is {value}; a finite number is needed to "
                "choose a token, and no NaN or inf beside it"
            )
