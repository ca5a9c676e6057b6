"""Speculative decoding: cheap guesses at the next tokens, which one pass of the model checks.

A pass over k guesses takes little more than a pass over one token as long as reading the weights
is what takes the time. The model's own choice, greedy or drawn, decides every token, by the same
logits and the same draw as without guesses: a guess counts where it is that very token, and so the
text is the same, token for token (stricter than Leviathan et al., 2023, who keep the distribution).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmcore.generation.reading import Reader
from llmcore.models.cache import KVCache
from llmcore.models.transformer import Decoder


@dataclass
class Stats:
    """How well guesses did, over all runs with a draft.

    passes    passes of the model, of each sequence of a batch counted by itself
    tokens    that came of them
    guessed   tokens guessed
    accepted  guesses that were the model's choice
    """

    passes: int = 0
    tokens: int = 0
    guessed: int = 0
    accepted: int = 0

    def add(self, passes: int, tokens: int, guessed: int, accepted: int) -> None:
        self.passes += passes
        self.tokens += tokens
        self.guessed += guessed
        self.accepted += accepted

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.guessed if self.guessed else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.guessed} guesses accepted ({self.acceptance_rate:.0%}), "
            f"{self.tokens_per_pass:.2f} tokens a pass"
        )


Choose = Callable[[Tensor], int]


class Draft(Protocol):
    """What guesses. It may keep a state for each text, and forgets it when told that it is over."""

    stats: Stats

    def guess(self, row: int, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        """Up to `most` tokens that may follow ids, the prompt and the answer so far of `row`.

        choose  what the run would choose, (1, V) logits -> token: by the draw that it will make for
                the first token after ids, then for the second, and so on
        """

    def forget(self, row: int) -> None:
        """The row is at its end."""


class LookupDraft:
    """Guesses that the text goes on as it did after its last words' previous occurrence.

    Good where answers repeat their prompt: summaries, corrections, code (prompt look-up decoding).

    guesses  how many tokens at most
    longest  words compared at most, in tokens, and `shortest` at least: the longest match counts
    """

    def __init__(self, guesses: int = 8, *, longest: int = 3, shortest: int = 1) -> None:
        _check_guesses(guesses)
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be from 1 to longest, got {shortest} and {longest}")
        self.guesses = guesses
        self.longest, self.shortest = longest, shortest
        self.stats = Stats()
        self._places: dict[int, _Places] = {}

    def guess(self, row: int, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        places = self._places.setdefault(row, _Places(self.longest, self.shortest))
        places.extend(ids)
        start = places.previous(ids)
        return [] if start is None else list(ids[start : start + min(most, self.guesses)])

    def forget(self, row: int) -> None:
        self._places.pop(row, None)


class _Places:
    """Where each run of tokens of a text last ended, for all runs of some lengths."""

    def __init__(self, longest: int, shortest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0  # tokens looked at; the run at the text's very end is not in the table

    def extend(self, ids: Sequence[int]) -> None:
        """The text is this now, longer than before."""
        for end in range(self._known, len(ids)):
            for n in self._lengths:
                if n <= end:
                    self._ends[tuple(ids[end - n : end])] = end
        self._known = len(ids)

    def previous(self, ids: Sequence[int]) -> int | None:
        """Behind the previous occurrence of the longest run that the text ends with."""
        runs = (tuple(ids[len(ids) - n :]) for n in self._lengths if n <= len(ids))
        return next((self._ends[run] for run in runs if run in self._ends), None)


class DraftModel:
    """Guesses what a smaller or coarser model with the same tokens says.

    Its tokens are chosen as the run's are, and drawn by the very numbers that the run will draw: so
    the more its probabilities resemble the model's, the more of its guesses are right. A copy of
    the model with weights in int4 is a good draft of itself.
    """

    def __init__(self, model: Decoder, guesses: int = 4) -> None:
        _check_guesses(guesses)
        self.model = model
        self.guesses = guesses
        self.stats = Stats()
        self._readers: dict[int, Reader] = {}

    def guess(self, row: int, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        room = self.model.config.context_length - len(ids)
        if row not in self._readers:
            cache = KVCache(self.model.config, 1, len(ids) + self.guesses)
            self._readers[row] = Reader(self.model, cache)
        text = list(ids)
        for _ in range(min(most, self.guesses, room + 1)):
            text.append(choose(self._readers[row].read(text)))
        return text[len(ids) :]

    def forget(self, row: int) -> None:
        self._readers.pop(row, None)


class LayerSkipDraft(DraftModel):
    """Guesses by the model's own first layers and its head: no second model is needed.

    (Self-speculative decoding, Zhang et al., 2023. How good the guesses are is a matter of the
    model: those trained to leave early, LayerSkip, Elhoushi et al., 2024, are made for it.)
    """

    def __init__(self, model: Decoder, layers: int, guesses: int = 4) -> None:
        super().__init__(first_layers(model, layers), guesses)


def first_layers(model: Decoder, layers: int) -> Decoder:
    """A decoder of a model's first layers, its norm and its head, all shared with it."""
    if not 1 <= layers < model.config.layers:
        raise ValueError(f"layers must be from 1 to {model.config.layers - 1}, got {layers}")
    with torch.device("meta"):
        short = Decoder(replace(model.config, layers=layers))
    short.embedding, short.position_embedding = model.embedding, model.position_embedding
    short.blocks, short.norm, short.head = model.blocks[:layers], model.norm, model.head
    short.training = model.training  # .train() would reach into the shared modules
    return short


def draft_for(model: Decoder, draft: str | Draft | None) -> Draft | None:
    """The draft that a name stands for; ValueError for an unknown one, or of other tokens."""
    if isinstance(draft, str):
        if draft != "lookup":
            raise ValueError(f"draft: got {draft!r}, expected 'lookup' or a draft (DraftModel ...)")
        return LookupDraft()
    if isinstance(draft, DraftModel):
        known, tokens = model.config.vocab_size, draft.model.config.vocab_size
        if tokens != known:
            raise ValueError(f"draft: its model has {tokens} tokens, this one {known}")
    return draft


def _check_guesses(guesses: int) -> None:
    if guesses < 1:
        raise ValueError(f"guesses must be at least 1, got {guesses}")
