"""Text out of a decoder: token after token, greedy or sampled, for one sequence or a padded batch.

Each pass reads only the newest token of each sequence; what came before is in the KV cache. A
sequence that has reached its end leaves the batch and costs nothing more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcore.models.cache import KVCache
from llmcore.models.transformer import Decoder
from llmcore.text.tokenizer import Tokenizer

# Slots reserved beyond the prompt at first: most answers end long before max_new_tokens.
FIRST_SLOTS = 256


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

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(B, V) -> (B,) int64. Each sequence draws one number from its own generator.

        ValueError for a row with NaN or +inf, or of -inf only.
        """
        if self.temperature == 0.0:
            best = logits.argmax(dim=-1, keepdim=True)  # NaN counts as the highest
            _check_highest(logits.gather(1, best))
            return best[:, 0]
        # In float64: 49152 float32 terms would lose the rare tokens in the running sum.
        sums = self.probabilities(logits).double().cumsum(dim=-1)
        draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in generators]
        total = sums[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(torch.stack(draws).to(sums.device) * total, below)
        return torch.searchsorted(sums, target, right=True)[:, 0]


def _check_highest(highest: Tensor) -> None:
    """ValueError unless the highest logit of each row is finite (so the rest is too, or -inf)."""
    if not bool(highest.isfinite().all()):
        bad = (~highest.isfinite()).nonzero()[0, 0]
        raise ValueError(
            f"logits: the highest of sequence {int(bad)} is {float(highest[bad, 0])}; a finite "
            "number is needed to choose a token, and no NaN or inf beside it"
        )


def generate(
    model: Decoder,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Iterable[int] | None = None,
    seed: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """ids (B, T) int64 -> (B, T + n) int64: the prompts and n <= max_new_tokens tokens more.

    temperature, top_k, top_p, min_p   see Sampling; greedy by default
    stop             token ids that end a sequence, kept in the result; the model's own by default.
                     What follows a sequence's end is filled with the model's (else the first) end.
    seed             sequence b draws from its own generator, seeded seed + b, or seed[b]; so what
                     it gets doesn't depend on the others. None: from torch's global generator.
    attention_mask   (B, T), False marks padding; generation continues at the end of each row, so
                     pad on the left (`tokenizer.batch` does)

    ValueError for wrong shapes, ids outside the vocabulary, a prompt without a token, options out
    of range, more tokens than the model's context holds, or a model whose logits are NaN or inf.
    """
    task = _Task(
        model,
        ids,
        attention_mask,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, min_p),
        _ends(model, stop),
        _generators(seed, len(ids)),
    )
    filler = (*model.config.eos_ids, *task.ends, 0)[0]
    columns = [ids]
    for rows, tokens in _steps(task):
        column = ids.new_full((len(ids), 1), filler)
        column[rows, 0] = tokens.to(ids.dtype)
        columns.append(column)
    return torch.cat(columns, dim=1)


def stream(
    model: Decoder,
    ids: Tensor,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    stop: int | Iterable[int] | None = None,
    seed: int | None = None,
    **choice: Any,
) -> Iterator[str]:
    """The answer to one prompt, ids (1, T): pieces of text, as soon as their characters are whole.

    The options and errors are generate's; `choice` holds those of Sampling. The end token is not
    part of the text.
    """
    if ids.shape[0] != 1:
        raise ValueError(f"stream takes one sequence, ids (1, T), got {tuple(ids.shape)}")
    task = _Task(
        model,
        ids,
        None,
        max_new_tokens,
        Sampling(**choice),
        _ends(model, stop),
        _generators(seed, 1),
    )
    return _pieces(task, tokenizer)


@dataclass(frozen=True)
class _Task:
    """What generate and stream have in common, checked."""

    model: Decoder
    ids: Tensor
    attention_mask: Tensor | None
    max_new_tokens: int
    sampling: Sampling
    ends: tuple[int, ...]
    generators: list[torch.Generator]

    def __post_init__(self) -> None:
        ids, mask, config = self.ids, self.attention_mask, self.model.config
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "ids must be whole numbers (B, T) with B and T at least 1, "
                f"got {ids.dtype} {tuple(ids.shape)}"
            )
        low, high = (int(edge) for edge in ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"ids must be from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        if mask is not None and not bool(mask.bool().any(dim=1).all()):
            raise ValueError("attention_mask leaves a prompt without any token")
        if mask is not None and not bool(mask.bool()[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the last column must be tokens")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        if ids.shape[1] + self.max_new_tokens > config.context_length:
            raise ValueError(
                f"{ids.shape[1]} tokens and {self.max_new_tokens} new ones exceed the context "
                f"length of {config.context_length}"
            )


def _steps(task: _Task) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (K,), tokens (K,)): the K sequences still going and the next token of each."""
    if task.max_new_tokens == 0:
        return
    model, ids, generators = task.model, task.ids, task.generators
    ends = torch.tensor(task.ends, dtype=torch.int64, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    slots = ids.shape[1] + min(task.max_new_tokens, FIRST_SLOTS)
    cache = KVCache(model.config, len(ids), slots)
    with torch.no_grad():
        logits = model(ids, cache, task.attention_mask, last_only=True)
    for left in range(task.max_new_tokens - 1, -1, -1):
        tokens = task.sampling.choose(logits[:, -1], generators)
        yield rows, tokens
        going = (~torch.isin(tokens, ends)).nonzero()[:, 0]
        if len(going) == 0 or left == 0:
            return
        if len(going) < len(tokens):
            rows, tokens = rows[going], tokens[going]
            generators = [generators[row] for row in going.tolist()]
            cache.select(going)
        with torch.no_grad():
            logits = model(tokens[:, None], cache, last_only=True)


def _pieces(task: _Task, tokenizer: Tokenizer) -> Iterator[str]:
    text = tokenizer.stream()
    for _, tokens in _steps(task):
        token = int(tokens)
        if token not in task.ends and (piece := text.push(token)):
            yield piece
    if rest := text.finish():
        yield rest


def _ends(model: Decoder, stop: int | Iterable[int] | None) -> tuple[int, ...]:
    if stop is None:
        return model.config.eos_ids
    return (stop,) if isinstance(stop, int) else tuple(stop)


def _generators(seed: int | Sequence[int] | None, batch: int) -> list[torch.Generator]:
    if seed is None:
        seeds = [int(s) for s in torch.randint(2**62, (batch,))]
    elif isinstance(seed, int):
        seeds = [seed + b for b in range(batch)]
    else:
        seeds = list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{batch} sequences need {batch} seeds, got {len(seeds)}")
    return [torch.Generator().manual_seed(s) for s in seeds]
