"""Text out of a decoder: token after token, for one sequence or a padded batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcore.generation.batch import Setup, Task, prompts_of, steps
from llmcore.generation.sampling import Sampler, Sampling, seeds
from llmcore.generation.stopping import Stopping, end_ids
from llmcore.models.transformer import Decoder
from llmcore.text.tokenizer import Tokenizer


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
    **setup: Any,
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
    task = Task(
        model,
        prompts_of(ids, attention_mask),
        max_new_tokens,
        Sampling(temperature, top_k, top_p, min_p),
        Stopping(end_ids(stop, model.config.eos_ids)),
        [Sampler(s) for s in seeds(seed, len(ids))],
        Setup(**setup),
    )
    filler = (*model.config.eos_ids, *task.stopping.ends, 0)[0]
    new: list[list[int]] = [[] for _ in ids]
    for step in steps(task):
        for row, token in zip(step.rows.tolist(), step.tokens.tolist(), strict=True):
            new[row].append(token)
    longest = max(map(len, new))
    rows = [row + [filler] * (longest - len(row)) for row in new]
    return torch.cat((ids, torch.tensor(rows).to(ids)), dim=1)


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
    task = Task(
        model,
        prompts_of(ids, None),
        max_new_tokens,
        Sampling(**choice),
        Stopping(end_ids(stop, model.config.eos_ids)),
        [Sampler(s) for s in seeds(seed, 1)],
    )
    return _pieces(task, tokenizer)


def _pieces(task: Task, tokenizer: Tokenizer) -> Iterator[str]:
    text = tokenizer.stream()
    for step in steps(task):
        token = int(step.tokens)
        if token not in task.stopping.ends and (piece := text.push(token)):
            yield piece
    if rest := text.finish():
        yield rest
