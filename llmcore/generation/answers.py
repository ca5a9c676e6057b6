"""What comes out of the loop of passes: whole answers, or pieces of one as it grows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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


def answers(task: Task, *, logprobs: bool = False) -> list[Answer]:
    """The answers to all prompts, in their order."""
    batch = len(task.prompts)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    chances: list[list[float]] = [[] for _ in range(batch)]
    stopped: set[int] = set()
    for step in steps(task):
        rows = step.rows.tolist()
        for row, token in zip(rows, step.tokens.tolist(), strict=True):
            tokens[row].append(token)
        if logprobs:
            found = log_probabilities(step.logits, step.tokens).tolist()
            for row, chance in zip(rows, found, strict=True):
                chances[row].append(chance)
        stopped.update(step.rows[step.ended].tolist())
    texts: list[str | None] = [None] * batch
    if task.stopping.texts is not None:
        texts = [text.finish() for text in task.stopping.texts]
    return [
        Answer(tokens[b], chances[b], "stop" if b in stopped else "length", texts[b])
        for b in range(batch)
    ]


def pieces(task: Task) -> Iterator[str]:
    """The text of the answer to one prompt, as soon as it is certain; task.stopping has texts."""
    assert task.stopping.texts is not None
    [text] = task.stopping.texts
    for _ in steps(task):
        if piece := text.take():
            yield piece
    if rest := text.finish():
        yield rest
