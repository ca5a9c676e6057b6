"""Text out of a decoder: token after token, for one prompt or many."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from llmcore.generation.answers import Answer, answers, pieces
from llmcore.generation.batch import Setup, Task, prompts_of
from llmcore.generation.beam import BeamSearch, beam_search
from llmcore.generation.sampling import Sampling, samplers_of
from llmcore.generation.sources import Sources
from llmcore.generation.speculative import draft_for
from llmcore.generation.stopping import Stopping, read_stop
from llmcore.models.transformer import Decoder, EncoderDecoder
from llmcore.text.tokenizer import Tokenizer

Prompts = Tensor | str | Sequence[str] | Sequence[Sequence[int]]
Stop = int | str | Iterable[int | str] | None


def generate(
    model: Decoder | EncoderDecoder,
    ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop: Stop = None,
    seed: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    return_logprobs: bool = False,
    **setup: Any,
) -> Any:
    """The prompts and what the model says to them: ids (B, T) -> (B, T + n), n <= max_new_tokens.

    ids              (B, T) int64; or lists of ids, of any lengths, as the result then is; or a
                     text, or several, for which a tokenizer is needed: then the result is the text
                     of the answer, or a list of them, without the prompts. An EncoderDecoder reads
                     them as sources (a text ends with the model's first end token there) and writes
                     targets: then the result is those, config.start_id first.
    temperature, top_k, top_p, min_p, repetition_penalty   see Sampling; greedy by default
    num_beams        above 1: beam search, which takes none of these; length_penalty and
                     early_stopping as in BeamSearch
    stop             token ids that end a sequence, in the place of the model's own, and texts that
                     do besides (these need a tokenizer); () for no end. The end is kept in the ids
                     and no part of the text. What follows it in ids is the model's end token, else
                     the first of `stop`.
    seed             sequence b draws from its own generator, seeded seed + b, or seed[b]; so what
                     it gets doesn't depend on the others. None: from torch's global generator.
    attention_mask   (B, T), False marks padding; generation continues at the end of each row, so
                     pad on the left (`tokenizer.batch` does); sources may be padded on any side
    return_logprobs  the result and (B, n) float32: the log-probability of each new token by the
                     model's own distribution, log softmax(logits), before temperature, filters and
                     penalty; 0 behind a sequence's end
    batch_size, paged, cache_dtype, prefix_cache, draft   how it is computed: see Setup. A draft
                     also by name: "lookup".

    ValueError for wrong shapes, ids outside the vocabulary, a prompt without a token, options out
    of range, more tokens than the model's context holds, or a model whose logits are NaN or inf.
    """
    task = _task(
        model,
        _prompts(model, ids, attention_mask, tokenizer),
        max_new_tokens,
        tokenizer,
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        stop=stop,
        seed=seed,
        **setup,
    )
    search = BeamSearch(num_beams, length_penalty, early_stopping)
    wide = num_beams > 1
    found = beam_search(task, search) if wide else answers(task, logprobs=return_logprobs)
    result: Any
    if isinstance(ids, Tensor):
        filler = (*model.config.eos_ids, *task.stopping.ends, 0)[0]
        new = _padded([answer.tokens for answer in found], filler)
        first = ids if task.sources is None else ids.new_tensor(task.prompts)
        result = torch.cat((first, new.to(ids)), dim=1)
    elif _are_texts(ids):
        texts = [answer.text for answer in found]
        result = texts[0] if isinstance(ids, str) else texts
    else:
        pairs = zip(task.prompts, found, strict=True)
        result = [[*prompt, *answer.tokens] for prompt, answer in pairs]
    if return_logprobs:
        return result, _padded([answer.logprobs for answer in found], 0.0).float()
    return result


def stream(
    model: Decoder | EncoderDecoder,
    ids: Tensor | str,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    stop: Stop = None,
    seed: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """The answer to one prompt, ids (1, T) or a text: pieces of text, as soon as they are certain.

    The pieces join to generate's text: none holds half a character, or what may turn out to be the
    beginning of a stop string. Options (Sampling's and Setup's) and errors are generate's.
    """
    if isinstance(ids, Tensor) and ids.shape[0] != 1:
        raise ValueError(f"stream takes one sequence, ids (1, T), got {tuple(ids.shape)}")
    sampling, setup = _split(options)
    prompts = _prompts(model, ids, None, tokenizer)
    return pieces(
        _task(model, prompts, max_new_tokens, tokenizer, sampling, stop=stop, seed=seed, **setup)
    )


def mean_logprob(answer: Answer) -> float:
    """The mean of the log-probabilities of an answer's tokens, -inf without any."""
    return sum(answer.logprobs) / len(answer.logprobs) if answer.logprobs else float("-inf")


class BestOf(NamedTuple):
    """Several answers to one prompt, the best first, and what the scorer said of each."""

    answers: list[Answer]
    scores: list[float]


def best_of(
    model: Decoder | EncoderDecoder,
    ids: Prompts,
    n: int,
    *,
    scorer: Callable[[Answer], float] = mean_logprob,
    max_new_tokens: int,
    stop: Stop = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> BestOf | list[BestOf]:
    """n sampled answers to each prompt, ranked; a BestOf for one text, else a list of them.

    All answers are one batch; a prompt is read only once.

    scorer  the higher the better; by default the mean of the tokens' log-probabilities
    seed    answer i to prompt b is what generate gives with the seed `seed + b * n + i`

    Options (Sampling's, with a temperature of 1 by default, and Setup's) and errors are generate's.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    sampling, setup = _split({"temperature": 1.0, **options})
    prompts = [p for p in _prompts(model, ids, attention_mask, tokenizer) for _ in range(n)]
    task = _task(model, prompts, max_new_tokens, tokenizer, sampling, stop=stop, seed=seed, **setup)
    found = answers(task, logprobs=True)
    ranked = [_ranked(found[b : b + n], scorer) for b in range(0, len(found), n)]
    return ranked[0] if isinstance(ids, str) else ranked


def _ranked(found: list[Answer], scorer: Callable[[Answer], float]) -> BestOf:
    pairs = [(answer, scorer(answer)) for answer in found]
    pairs.sort(key=lambda pair: pair[1], reverse=True)
    return BestOf([answer for answer, _ in pairs], [score for _, score in pairs])


def _prompts(
    model: Decoder | EncoderDecoder,
    ids: Prompts,
    attention_mask: Tensor | None,
    tokenizer: Tokenizer | None,
) -> list[list[int]]:
    """The prompts, or an encoder-decoder's sources."""
    if not isinstance(model, (Decoder, EncoderDecoder)):
        raise TypeError(f"an {type(model).__name__} doesn't generate: take a Decoder")
    sources = isinstance(model, EncoderDecoder)
    if isinstance(ids, Tensor):
        return prompts_of(ids, attention_mask, left=not sources)
    if attention_mask is not None:
        raise ValueError("attention_mask belongs to ids (B, T); lists and texts have no padding")
    if not _are_texts(ids):
        return [list(map(int, prompt)) for prompt in ids]
    if tokenizer is None:
        raise ValueError("prompts as text need a tokenizer: tokenizer=")
    texts = [ids] if isinstance(ids, str) else cast("Sequence[str]", ids)
    end = model.config.eos_ids[:1] if sources else ()
    return [[*tokenizer.encode(text), *end] for text in texts]


def _are_texts(prompts: Prompts) -> bool:
    return isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts)


def _task(
    model: Decoder | EncoderDecoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer | None,
    sampling: Sampling,
    *,
    stop: Stop,
    seed: int | Sequence[int] | None,
    prefix_cache: Any = None,
    draft: Any = None,
    **setup: Any,
) -> Task:
    ends, stops = read_stop(stop, model.config.eos_ids)
    sources = None
    if isinstance(model, EncoderDecoder):
        sources = Sources(model, prompts)
        model, prompts = model.decoder, sources.prompts
    return Task(
        model,
        prompts,
        max_new_tokens,
        sampling,
        Stopping(ends, stops, tokenizer, len(prompts)),
        samplers_of(prompts, seed),
        Setup(prefixes=prefix_cache, draft=draft_for(model, draft), **setup),
        sources,
    )


def _split(options: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """Sampling out of its options, and those that are Setup's."""
    names = {field.name for field in dataclasses.fields(Sampling)}
    choice = {name: value for name, value in options.items() if name in names}
    return Sampling(**choice), {k: v for k, v in options.items() if k not in names}


def _padded(rows: Sequence[Sequence[float]], filler: float) -> Tensor:
    """Rows of different lengths as one tensor, filled up behind."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
