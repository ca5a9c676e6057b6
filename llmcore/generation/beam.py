"""Beam search: the continuations of a prompt that are the most probable as a whole.

Of all one-token extensions of a prompt's live beams the most probable ones are kept: those that end
are finished hypotheses, the best of the others are the next live beams. Scores, the order in which
things are looked at and the three meanings of `early_stopping` are those of Hugging Face
transformers. Each prompt is searched by itself: what the others do changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmcore.generation.answers import Answer
from llmcore.generation.batch import FIRST_SLOTS, Task
from llmcore.generation.reading import Reader, run
from llmcore.generation.sampling import Sampling
from llmcore.generation.stopping import AnswerText
from llmcore.models.cache_base import Cache


@dataclass(frozen=True)
class BeamSearch:
    """How wide, and when it is over.

    num_beams       live beams of each prompt
    length_penalty  a finished hypothesis of n tokens scores sum(logprobs) / n ** length_penalty
    early_stopping  True: over when num_beams hypotheses are finished; False: when the best live
                    beam, as long as it is now, scores no more than the worst of them; "never": the
                    same, but a live beam may grow to max_new_tokens if that raises its score
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )


class Beam(NamedTuple):
    """An answer on its way: its log-probability, and its tokens with that of each."""

    total: float
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class Extension(NamedTuple):
    """A live beam, by its place, and one token more."""

    parent: int
    token: int
    logprob: float
    total: float


class Finished(NamedTuple):
    score: float
    beam: Beam
    stopped: bool  # by an end token


class PromptSearch:
    """The search over one prompt's continuations: its live beams, and the best finished ones."""

    def __init__(self, settings: BeamSearch, ends: tuple[int, ...], max_new_tokens: int) -> None:
        self.settings = settings
        self.ends = ends
        self.max_new_tokens = max_new_tokens
        self.live = [Beam(0.0)]
        self.finished: list[Finished] = []

    def extend(self, extensions: list[Extension]) -> list[int]:
        """Of these, best first, take the next live beams; returns their parents, [] at the end.

        There must be enough of them that num_beams don't end.
        """
        width = self.settings.num_beams
        live: list[Beam] = []
        parents: list[int] = []
        for rank, (parent, token, logprob, total) in enumerate(extensions):
            old = self.live[parent]
            beam = Beam(total, (*old.tokens, token), (*old.logprobs, logprob))
            length, stopped = len(beam.tokens), token in self.ends
            if not stopped and len(live) < width:
                live.append(beam)
                parents.append(parent)
            if rank < width and (stopped or length == self.max_new_tokens):
                score = total / length**self.settings.length_penalty
                self.finished.append(Finished(score, beam, stopped))
        self.finished = sorted(self.finished, key=lambda f: f.score, reverse=True)[:width]
        self.live = live
        return [] if self._is_over() else parents

    def _is_over(self) -> bool:
        length = len(self.live[0].tokens)
        if length == self.max_new_tokens:
            return True
        if len(self.finished) < self.settings.num_beams:
            return False
        if self.settings.early_stopping is True:
            return True
        penalty = self.settings.length_penalty
        if self.settings.early_stopping == "never" and penalty > 0.0:
            length = self.max_new_tokens
        return self.live[0].total / length**penalty <= self.finished[-1].score


def beam_search(task: Task, settings: BeamSearch) -> list[Answer]:
    """The best answer to each prompt, its text where the task has a tokenizer.

    ValueError for too many beams, and for what beam search does not know: sampling, penalties and
    stop strings.
    """
    if task.sampling != Sampling():
        raise ValueError("num_beams: beam search takes no temperature, filter or penalty")
    if task.setup.draft is not None:
        raise ValueError("num_beams: beam search takes no draft")
    if task.stopping.stops:
        raise ValueError("num_beams: beam search ends at token ids, not at texts")
    ends, vocab_size = task.stopping.ends, task.model.config.vocab_size
    count = max(2, 1 + len(ends)) * settings.num_beams
    if count > vocab_size:
        raise ValueError(
            f"num_beams {settings.num_beams} compares {count} tokens, there are {vocab_size}"
        )
    searches = [PromptSearch(settings, ends, task.max_new_tokens) for _ in task.prompts]
    if task.max_new_tokens > 0 and searches:
        _run(task, searches, count)
    texts: Sequence[AnswerText | None] = task.stopping.texts or [None] * len(searches)
    return [_answer(search.finished, text) for search, text in zip(searches, texts, strict=True)]


def _run(task: Task, searches: list[PromptSearch], count: int) -> None:
    """Pass after pass over all live beams, until every search is over."""
    cache, logits = _read(task)
    while True:
        logprobs = logits.float().log_softmax(dim=-1)
        width = len(logits) // len(searches)  # one live beam at first
        going, parents = [], []
        for i, extensions in enumerate(_extensions(searches, logprobs, count)):
            kept = searches[i].extend(extensions)
            parents += [i * width + parent for parent in kept]
            if kept:
                going.append(searches[i])
        if not going:
            return
        searches = going
        if parents != list(range(len(logits))):
            cache.select(torch.tensor(parents))
        newest = [[beam.tokens[-1]] for search in searches for beam in search.live]
        logits = run(task.model, newest, cache)[:, -1]


def _read(task: Task) -> tuple[Cache, Tensor]:
    """A cache of the prompts and the logits (B, V) behind them."""
    slots = max(map(len, task.prompts)) + min(task.max_new_tokens, FIRST_SLOTS)
    cache = task.setup.cache(task.model, len(task.prompts), slots)
    reader = Reader(task.model, task.setup.cache(task.model, 1, slots), task.setup.prefixes)
    logits = []
    for place, prompt in enumerate(task.prompts):
        if task.sources is not None:
            reader.turn_to(task.sources.of([place]))
        logits.append(reader.read(prompt))
        cache.put(place, reader.cache.take(0))
    return cache, torch.cat(logits)


def _extensions(
    searches: list[PromptSearch], logprobs: Tensor, count: int
) -> Iterator[list[Extension]]:
    """The `count` best of each search, best first; logprobs (searches * live beams, V)."""
    vocab_size = logprobs.shape[-1]
    totals = logprobs.new_tensor([[beam.total] for search in searches for beam in search.live])
    best, places = (logprobs + totals).view(len(searches), -1).topk(count)
    chances = logprobs.view(len(searches), -1).gather(1, places)
    columns = (places // vocab_size, places % vocab_size, chances, best)
    for row in zip(*(column.tolist() for column in columns), strict=True):
        yield [Extension(*one) for one in zip(*row, strict=True)]


def _answer(finished: list[Finished], text: AnswerText | None) -> Answer:
    _, beam, stopped = finished[0] if finished else Finished(0.0, Beam(0.0), stopped=False)
    tokens = list(beam.tokens)
    if text is not None:
        for token in tokens[:-1] if stopped else tokens:
            text.push(token)
    return Answer(
        tokens,
        list(beam.logprobs),
        "stop" if stopped else "length",
        None if text is None else text.finish(),
    )
