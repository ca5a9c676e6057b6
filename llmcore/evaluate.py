"""How well a decoder predicts text: its perplexity, over windows that slide along the tokens.

    perplexity    = exp(-sum_t log p(token_t | the tokens before it in its window) / tokens)
    bits per byte = -sum_t log2 p(...) / bytes of those tokens

A token is predicted once, in the first window that holds it; only the first window predicts its
first tokens from nothing before them, so that all others see at least `window - stride` tokens.
The text's first token is predicted by nobody and counts in neither. Bits per byte compare models
of different vocabularies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmcore import ops
from llmcore.models.cache import KVCache
from llmcore.models.transformer import Decoder
from llmcore.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a text; those of several texts can be added.

    nats    -sum of the natural logarithms of the predicted tokens' probabilities
    tokens  how many were predicted
    bytes   that they stand for
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(
            self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens) if self.tokens else float("nan")

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str | bytes | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Likelihood:
    """The likelihood of a text, or of token ids.

    model   a Decoder, or any causal model with a config.context_length: ids (1, T) to logits
    window  tokens that the model sees at once; by default 1024, or its context where that is less
    stride  how far windows move on; by default half a window

    ValueError for a window or stride out of range, or what the tokenizer can't encode.
    """
    context: int = model.config.context_length  # type: ignore[union-attr, assignment]
    window = min(1024, context) if window is None else window
    if not 2 <= window <= context:
        raise ValueError(f"window must be from 2 to the context of {context}, got {window}")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to window - 1, {window - 1}, got {stride}")
    ids = tokenizer.encode(text) if isinstance(text, (str, bytes)) else list(text)
    nats, known = 0.0, 1
    for start in range(0, len(ids), stride):
        if known >= len(ids):
            break
        end = min(start + window, len(ids))
        nats += _nats(model, ids[start:end], known - start)
        known = end
    return Likelihood(nats, max(len(ids) - 1, 0), len(tokenizer.decode_bytes(ids[1:])))


@torch.no_grad()
def _nats(model: nn.Module, ids: list[int], first: int) -> float:
    """-log p of the tokens from place `first` on, each from those before it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([ids], device=device)
    if isinstance(model, Decoder):
        cache = KVCache(model.config, 1, len(ids))
        if first > 1:  # what is only read needs no logits
            model(tokens[:, : first - 1], cache, last_only=True)
        logits = model(tokens[:, first - 1 : -1], cache)[0].float()
    else:
        logits = model(tokens[:, :-1])[0, first - 1 :].float()
    return float(ops.cross_entropy(logits, tokens[0, first:], reduction="none").double().sum())
