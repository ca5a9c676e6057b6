"""The source texts that an encoder-decoder's targets are conditioned on, encoded in their turn.

A source's keys and values for cross-attention are made once, and move with its sequence from cache
to cache; the decoder's own passes are those of any other decoder.
"""

from collections.abc import Sequence

import torch

from llmcore.models.cache_base import Source
from llmcore.models.transformer import EncoderDecoder

# Source tokens in one pass, padding included: what reading a prompt has, several times over, for
# there is no cache to fill block by block.
SOURCE_BLOCK = 4096


class Sources:
    """An encoder-decoder and the source texts of its task."""

    def __init__(self, model: EncoderDecoder, texts: Sequence[Sequence[int]]) -> None:
        """ValueError for an empty text, a token outside the vocabulary, too long a text, or a model
        that doesn't say what targets begin with."""
        config = model.config
        if config.start_id is None:
            raise ValueError("the model's config.start_id, which every target begins with, is None")
        for row, text in enumerate(texts):
            if not text:
                raise ValueError(f"source {row} is without any token")
            low, high = min(text), max(text)
            if low < 0 or high >= config.vocab_size:
                raise ValueError(
                    f"ids must be from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}"
                )
            if len(text) > config.context_length:
                raise ValueError(
                    f"source {row} has {len(text)} tokens, more than the context of "
                    f"{config.context_length}"
                )
        self.model, self.texts = model, texts
        self.prompts = [[config.start_id] for _ in texts]

    def together(self, rows: Sequence[int]) -> int:
        """How many of these, from the first on, one pass takes: at least one."""
        longest = 0
        for count, row in enumerate(rows):
            longest = max(longest, len(self.texts[row]))
            if count and (count + 1) * longest > SOURCE_BLOCK:
                return count
        return len(rows)

    def of(self, rows: Sequence[int]) -> Source:
        """The sources of these sequences, in one pass."""
        texts = [self.texts[row] for row in rows]
        longest = max(map(len, texts))
        device = self.model.decoder.device
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
        mask = None
        if min(map(len, texts)) < longest:
            lengths = torch.tensor([len(text) for text in texts], device=device)
            mask = torch.arange(longest, device=device) < lengths[:, None]
        with torch.no_grad():
            return self.model.read(ids, mask)
