"""What comes out of the loop of passes: whole answers, or pieces of one as it grows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from llmcore.generation.batch import Task, steps
from llmcore.generation.sampling import log_probabilities


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt.

    tokens    their ids, the one that ended it included
    logprobs  log softmax(logits) of each token: the model's own probabilities, whatever chose it;
              empty unless asked for
    finish    "stop": an end token or a stop string ended it; "length": max_new_tokens did
    text      without the end; None where no tokenizer was given
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    text: str | None


@torch.no_grad()  # once, not in each pass
def answers(task: Task, *, logprobs: bool = False) -> list[Answer]:
    """The answers to all prompts, in their order."""
    found = dict(finished(task, logprobs=logprobs))
    return [found[row] for row in range(len(task.prompts))]


def finished(task: Task, *, logprobs: bool = False) -> Iterator[tuple[int, Answer]]:
    """Which prompt, and the answer to it, as soon as that is complete."""
    texts = task.stopping.texts
    tokens: dict[int, list[int]] = {row: [] for row in range(len(task.prompts))}
    chances: dict[int, list[float]] = {row: [] for row in tokens}

    def answer(row: int, finish: Literal["stop", "length"]) -> Answer:
        text = None if texts is None else texts[row].finish()
        return Answer(tokens.pop(row), chances.pop(row), finish, text)

    for step in steps(task):
        if logprobs:
            found = log_probabilities(step.logits, step.tokens)
            for row, chance in zip(step.rows, found, strict=True):
                chances[row].append(chance)
        for row, token, ended in zip(step.rows, step.tokens, step.ended, strict=True):
            tokens[row].append(token)
            if ended or len(tokens[row]) == task.max_new_tokens:
                yield row, answer(row, "stop" if ended else "length")
    for row in list(tokens):  # without new tokens
        yield row, answer(row, "length")


def pieces(task: Task) -> Iterator[str]:
    """The text of the answer to one prompt, as soon as it is certain; task.stopping has texts."""
    assert task.stopping.texts is not None
    [text] = task.stopping.texts
    for _ in steps(task):
        if piece := text.take():
            yield piece
    if rest := text.finish():
        yield rest
