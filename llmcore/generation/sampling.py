"""How the next token is chosen from the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in this order, each to what the last left.

    temperature  0: the most probable token; above: drawn from softmax(logits / temperature)
    top_k        only the k most probable tokens, and what is exactly as probable as the last
    top_p        only the most probable tokens that together reach the probability p
    min_p        only tokens at least min_p times as probable as the most probable one
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a number above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if filters and self.temperature == 0.0:
            raise ValueError(f"{filters[0]} chooses nothing at temperature 0: set a temperature")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) float logits -> (B, V) float32 probabilities, filtered; temperature above 0.

        ValueError for a row with NaN or +inf, or of -inf only.
        """
        logits = logits.float()
        highest = logits.amax(dim=-1, keepdim=True)
        _check_highest(highest)
        # Differences first: what is divided by a tiny temperature overflows to -inf at most, never
        # in the best token. Float32 must hold the temperature: 0 / 0 and -inf / inf would be NaN.
        range32 = torch.finfo(torch.float32)
        scores = (logits - highest) / min(max(self.temperature, range32.tiny), range32.max)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            worst = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < worst, float("-inf"))
        p = scores.softmax(dim=-1)
        if self.top_p is not None:
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            # A token stays if those before it haven't reached top_p: the best one always does.
            beyond = ranked.cumsum(dim=-1, dtype=torch.float64) - ranked >= self.top_p
            p = p.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        return p / p.sum(dim=-1, keepdim=True)

    def choose(self, logits: Tensor, samplers: "Sequence[Sampler]") -> Tensor:
        """(B, V) -> (B,) int64: the next token of B sequences, each by its own sampler.

        ValueError for a row with NaN or +inf, or of -inf only.
        """
        if self.temperature == 0.0:
            best = logits.argmax(dim=-1, keepdim=True)  # NaN counts as the highest
            _check_highest(logits.gather(1, best))
            return best[:, 0]
        # In float64: 49152 float32 terms would lose the rare tokens in the running sum.
        sums = self.probabilities(logits).double().cumsum(dim=-1)
        draws = [sampler.draw() for sampler in samplers]
        total = sums[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(torch.stack(draws).to(sums.device) * total, below)
        return torch.searchsorted(sums, target, right=True)[:, 0]


class Sampler:
    """What one sequence brings to the choice of its tokens: numbers drawn by its own seed.

    It belongs to the sequence, whatever batch that is in and whichever place it has there.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """(1,) float64 in [0, 1)."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)


def seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """A seed for each of B sequences; None takes them from torch's global generator."""
    if seed is None:
        found = [int(s) for s in torch.randint(2**62, (batch,))]
    elif isinstance(seed, int):
        found = [seed + b for b in range(batch)]
    else:
        found = list(seed)
    if len(found) != batch:
        raise ValueError(f"{batch} sequences need {batch} seeds, got {len(found)}")
    return found


def _check_highest(highest: Tensor) -> None:
    """ValueError unless the highest logit of each row is finite (so the rest is too, or -inf)."""
    if not bool(highest.isfinite().all()):
        bad = (~highest.isfinite()).nonzero()[0, 0]
        raise ValueError(
            f"logits: the highest of sequence {int(bad)} is {float(highest[bad, 0])}; a finite "
            "number is needed to choose a token, and no NaN or inf beside it"
        )
