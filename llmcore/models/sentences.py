"""Texts as vectors: one for each text, of an encoder's hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcore.models.transformer import Encoder
from llmcore.text.word_pieces import WordPieces

# Texts in one pass: enough to keep the kernels busy.
BATCH = 64


@torch.no_grad()
def embed(
    model: Encoder, tokenizer: WordPieces, texts: Sequence[str], *, kind: str = "mean"
) -> Tensor:
    """A vector (C,) of length 1 for each text, (B, C): products of two are their cosines.

    A text's vector does not depend on the others. kind: see `pool`. A text that is longer than the
    model's context loses its end.
    """
    # Alike in length side by side: little padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.width, dtype=model.dtype)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids, mask, types = tokenizer.batch(
            [texts[i] for i in rows], limit=model.config.context_length
        )
        kinds = types if model.config.token_types else None
        pooled = pool(model(ids, mask, kinds), mask, kind)
        vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1)
    return vectors


def pool(hidden: Tensor, attention_mask: Tensor | None = None, kind: str = "mean") -> Tensor:
    """One vector (B, C) for each text of hidden states (B, T, C).

    kind  "mean" of the tokens that attention_mask (B, T) says count, or the "first" of them
    """
    if kind not in ("mean", "first"):
        raise ValueError(f'kind must be "mean" or "first", got {kind!r}')
    if attention_mask is None:
        attention_mask = hidden.new_ones(hidden.shape[:2])
    mask = attention_mask.to(hidden.dtype)[..., None]
    if kind == "first":
        first = mask.argmax(dim=1, keepdim=True).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, first)[:, 0]
    # `where`, for what padding holds may be NaN
    kept = torch.where(mask > 0, hidden, 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
