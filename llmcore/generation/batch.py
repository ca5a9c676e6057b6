"""The loop of passes: all sequences of a batch, one token further with each pass.

Each pass reads only the newest token of each sequence; what came before is in the KV cache. A
sequence that has reached its end leaves the batch and costs nothing more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore.generation.sampling import Sampler, Sampling
from llmcore.generation.stopping import Stopping
from llmcore.models.cache import KVCache
from llmcore.models.transformer import Decoder

# Slots reserved beyond the prompt at first: most answers end long before max_new_tokens.
FIRST_SLOTS = 256


class Step(NamedTuple):
    """What one pass gave to the K sequences still going.

    rows    (K,) int64: which they are
    tokens  (K,) int64: the next token of each
    logits  (K, V): what the model said, from which they were chosen
    ended   (K,) bool: whose last token it is
    """

    rows: Tensor
    tokens: Tensor
    logits: Tensor
    ended: Tensor


@dataclass(frozen=True)
class Task:
    """What is to be generated, checked."""

    model: Decoder
    ids: Tensor
    attention_mask: Tensor | None
    max_new_tokens: int
    sampling: Sampling
    stopping: Stopping
    samplers: list[Sampler]

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


def steps(task: Task) -> Iterator[Step]:
    """Pass after pass, until every sequence is at its end or has max_new_tokens."""
    if task.max_new_tokens == 0:
        return
    model, ids, samplers = task.model, task.ids, task.samplers
    rows = torch.arange(len(ids), device=ids.device)
    slots = ids.shape[1] + min(task.max_new_tokens, FIRST_SLOTS)
    cache = KVCache(model.config, len(ids), slots)
    with torch.no_grad():
        logits = model(ids, cache, task.attention_mask, last_only=True)[:, -1]
    for left in range(task.max_new_tokens - 1, -1, -1):
        tokens = task.sampling.choose(logits, samplers)
        ended = task.stopping.ended(rows, tokens)
        yield Step(rows, tokens, logits, ended)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or left == 0:
            return
        if len(going) < len(tokens):
            rows, tokens = rows[going], tokens[going]
            samplers = [samplers[row] for row in going.tolist()]
            cache.select(going)
        with torch.no_grad():
            logits = model(tokens[:, None], cache, last_only=True)[:, -1]
