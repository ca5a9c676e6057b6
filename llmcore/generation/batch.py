"""The loop of passes: all sequences of a batch, one token further with each pass.

Each pass reads only the newest token of each sequence, and guesses at the next ones where there is
a draft; what came before is in the cache. A sequence that has reached its end gives its place to
the next prompt at once, and when there is none, costs nothing more. What a sequence gets depends
neither on the others nor on who guesses: its bits are those that it has alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore.generation.prefix import PrefixCache
from llmcore.generation.reading import Reader, run, together
from llmcore.generation.sampling import Sampler, Sampling, rows_of
from llmcore.generation.sources import Sources
from llmcore.generation.speculative import Draft
from llmcore.generation.stopping import Stopping
from llmcore.models.cache import KVCache
from llmcore.models.cache_base import Cache
from llmcore.models.kv_buffers import StoredDtype
from llmcore.models.paged_cache import PagedKVCache
from llmcore.models.transformer import Decoder

# Slots reserved beyond the prompt at first: most answers end long before max_new_tokens.
FIRST_SLOTS = 256


class Step(NamedTuple):
    """One token more of K sequences.

    rows    which they are, by the number of their prompt
    tokens  the next token of each
    ended   whose last token it is, by `Stopping`
    said    (B, T, V): the logits of the pass; these tokens come of [places, at]

    Nothing here is a tensor that need not be, nor made before it is asked for: a pass has swept the
    caches, and the next call into torch takes some 30 microseconds (Zen 4, 2026-11-28).
    """

    rows: list[int]
    tokens: list[int]
    ended: list[bool]
    said: Tensor
    places: list[int]
    at: int

    @property
    def logits(self) -> Tensor:
        """(K, V): what the model said, from which the tokens were chosen."""
        return self.said[self.places, self.at]


@dataclass(frozen=True)
class Setup:
    """How a task is run. No token depends on it, but for rounded keys and values.

    batch_size   sequences at a time; None: all
    paged        keys and values in pages: memory by the tokens that there are
    cache_dtype  keys and values rounded: "bf16" or "int8"
    prefixes     what it has of a prompt is not computed again, and it gets the answers too
    draft        guesses at the tokens to come
    """

    batch_size: int | None = None
    paged: bool = False
    cache_dtype: StoredDtype | None = None
    prefixes: PrefixCache | None = None
    draft: Draft | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be None or at least 1, got {self.batch_size}")

    def cache(self, model: Decoder, batch: int, slots: int) -> Cache:
        if self.paged:
            return PagedKVCache(model.config, batch, dtype=self.cache_dtype)
        return KVCache(model.config, batch, slots, dtype=self.cache_dtype)


@dataclass(frozen=True)
class Task:
    """What is to be generated, checked.

    sources  what an encoder-decoder's decoder attends to, one of each prompt
    """

    model: Decoder
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stopping: Stopping
    samplers: Sequence[Sampler]
    setup: Setup = Setup()
    sources: Sources | None = None

    def __post_init__(self) -> None:
        config, prefixes = self.model.config, self.setup.prefixes
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        for row, prompt in enumerate(self.prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} is without any token")
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= config.vocab_size:
                raise ValueError(
                    f"ids must be from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}"
                )
            if len(prompt) + self.max_new_tokens > config.context_length:
                raise ValueError(
                    f"{len(prompt)} tokens and {self.max_new_tokens} new ones exceed the context "
                    f"length of {config.context_length}"
                )
        if prefixes is not None:
            if self.sources is not None:
                raise ValueError(
                    "prefix_cache: targets of different sources have nothing in common"
                )
            if prefixes.model is not self.model:
                raise ValueError("prefix_cache belongs to another model")
            if prefixes.dtype != self.setup.cache_dtype:
                raise ValueError(
                    f"prefix_cache holds {prefixes.dtype}, cache_dtype is {self.setup.cache_dtype}"
                )


def prompts_of(ids: Tensor, attention_mask: Tensor | None, *, left: bool = True) -> list[list[int]]:
    """The rows of ids (B, T) without their padding; ValueError for wrong shapes or empty rows.

    left  padding must be on the left
    """
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "ids must be whole numbers (B, T) with B and T at least 1, "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )
    if attention_mask is None:
        return ids.tolist()
    mask = attention_mask.bool()
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of ids {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    if not bool(mask.any(dim=1).all()):
        raise ValueError("attention_mask leaves a prompt without any token")
    if left and not bool(mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: the last column must be tokens")
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def steps(task: Task) -> Iterator[Step]:
    """Step after step, until every sequence is at its end or has max_new_tokens."""
    if task.max_new_tokens == 0 or not task.prompts:
        return
    state = _Run(task)
    try:
        while True:
            while state.waiting and None in state.places:
                yield state.begin()
            if not any(state.places):
                return
            yield from state.advance()
    finally:
        state.close()


class _Sequence:
    """A prompt and its answer so far; the cache holds all but the newest token."""

    def __init__(self, row: int, prompt: Sequence[int], left: int) -> None:
        self.row = row
        self.ids = list(prompt)
        self.left = left  # tokens that it may still get
        self.ended = False

    def __len__(self) -> int:
        return len(self.ids)


class _Said:
    """What the model said in a pass: logits (B, T, V), and the same as `Sampling` takes them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.numbers = logits, rows_of(logits)


class _Run:
    """A task on its way: which prompts wait, and which sequence is in which place of the cache."""

    def __init__(self, task: Task) -> None:
        self.task, self.draft = task, task.setup.draft
        self.waiting = deque(range(len(task.prompts)))
        batch = min(task.setup.batch_size or len(task.prompts), len(task.prompts))
        self.places: list[_Sequence | None] = [None] * batch
        slots = max(map(len, task.prompts)) + min(task.max_new_tokens, FIRST_SLOTS)
        self.cache = task.setup.cache(task.model, batch, slots)
        # A prompt is read by itself and then put into its place, or is there if it's the only one.
        own = self.cache if batch == 1 else task.setup.cache(task.model, 1, slots)
        self.reader = Reader(task.model, own, task.setup.prefixes)

    def begin(self) -> Step:
        """Read the next prompts into free places, and choose their first tokens."""
        free = [place for place, sequence in enumerate(self.places) if sequence is None]
        rows = list(islice(self.waiting, len(free)))
        if self.task.sources is not None:
            rows = rows[: self.task.sources.together(rows)]
        texts = [self.task.prompts[row] for row in rows]
        count, common = together(texts)
        cache, logits = self._read(rows[:count], texts[:count], common)
        sequences = []
        for i, place in enumerate(free[:count]):
            if cache is not self.cache:
                self.cache.put(place, cache.take(i))
            sequence = _Sequence(self.waiting.popleft(), texts[i], self.task.max_new_tokens)
            self.places[place] = sequence
            sequences.append(sequence)
        step = self._choose(sequences, _Said(logits[:, None]), list(range(count)), 0)
        self._clear()
        return step

    def advance(self) -> list[Step]:
        """One pass, and the token or, by good guesses, the tokens that come of it."""
        self._close_gaps()
        sequences = [sequence for sequence in self.places if sequence is not None]
        guesses = [self._guess(sequence) for sequence in sequences]
        newest = [[s.ids[-1], *guess] for s, guess in zip(sequences, guesses, strict=True)]
        logits = run(self.task.model, newest, self.cache, last_only=not any(guesses))
        said, found, going, accepted = _Said(logits), [], list(range(len(sequences))), 0
        for t in range(said.numbers.shape[1]):
            found.append(self._choose([sequences[k] for k in going], said, going, t))
            right = [k for k in going if guesses[k][t : t + 1] == sequences[k].ids[-1:]]
            accepted += len(right)
            going = [k for k in right if not sequences[k].ended]
            if not going:
                break
        if any(guesses):
            self.cache.truncate([len(sequence) - 1 for sequence in sequences])
        if self.draft is not None:
            self.draft.stats.add(
                passes=len(sequences),
                tokens=sum(len(step.rows) for step in found),
                guessed=sum(map(len, guesses)),
                accepted=accepted,
            )
        self._clear()
        return found

    def close(self) -> None:
        """The run is over, also before its end: what the sequences have so far is not lost."""
        counts = self.cache.counts
        for place, sequence in enumerate(self.places):
            if sequence is not None:
                sequence.ended = True
                counts[place] = min(counts[place], len(sequence))  # without guesses
        self.cache.truncate(counts)
        self._clear()

    def _read(
        self, rows: Sequence[int], texts: Sequence[Sequence[int]], common: int
    ) -> tuple[Cache, Tensor]:
        """A cache of these texts, of which `common` tokens are the same, and logits (n, V)."""
        source = None if self.task.sources is None else self.task.sources.of(rows)
        if len(texts) == 1:
            if source is not None:
                self.reader.turn_to(source)
            return self.reader.cache, self.reader.read(texts[0])
        cache = self.task.setup.cache(self.task.model, len(texts), max(map(len, texts)))
        cache.source = source
        self.reader.hold(texts[0][:common])
        for row, text in enumerate(texts):
            known = self.reader.known(text[:-1])
            if known is not None and known.length > common:
                cache.put(row, known)
            elif common > 0:
                cache.put(row, self.reader.cache.take(0))
        new = [text[count:] for text, count in zip(texts, cache.counts, strict=True)]
        return cache, run(self.task.model, new, cache)[:, -1]

    def _guess(self, sequence: _Sequence) -> list[int]:
        if self.draft is None:
            return []
        room = self.task.model.config.context_length - len(self.cache) - 1
        most = min(sequence.left - 1, room)
        if most <= 0:
            return []
        ahead = self.task.samplers[sequence.row].copy()

        def choose(logits: Tensor) -> int:
            return self.task.sampling.choose(rows_of(logits), [ahead])[0]

        return self.draft.guess(sequence.row, sequence.ids, most, choose)

    def _choose(self, sequences: list[_Sequence], said: _Said, places: list[int], at: int) -> Step:
        """The next token of each of these, from what was said [places, at]."""
        rows = [sequence.row for sequence in sequences]
        logits = said.numbers[:, at]
        if len(places) < len(logits):
            logits = logits[places]
        tokens = self.task.sampling.choose(logits, [self.task.samplers[row] for row in rows])
        ended = self.task.stopping.ended(rows, tokens)
        for sequence, token, end in zip(sequences, tokens, ended, strict=True):
            sequence.ids.append(token)
            sequence.left -= 1
            sequence.ended = end or sequence.left == 0
        return Step(rows, tokens, ended, said.logits, places, at)

    def _clear(self) -> None:
        """Sequences at their end leave their places."""
        for place, sequence in enumerate(self.places):
            if sequence is None or not sequence.ended:
                continue
            held = sequence.ids[: self.cache.counts[place]]
            if self.reader.cache is self.cache:
                self.reader.ids = held
            if self.task.setup.prefixes is not None:
                self.task.setup.prefixes.add(held, self.cache.take(place))
            if self.draft is not None:
                self.draft.forget(sequence.row)
            self.places[place] = None

    def _close_gaps(self) -> None:
        """Places that nobody waits for are given up."""
        taken = [place for place, sequence in enumerate(self.places) if sequence is not None]
        if len(taken) < len(self.places):
            self.cache.select(torch.tensor(taken))
            self.places = [self.places[place] for place in taken]
