"""Reading text into a cache, block by block, and only what the cache doesn't hold already."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcore.generation.prefix import PrefixCache, common_length
from llmcore.models.cache_base import Cache
from llmcore.models.transformer import Decoder

# Tokens in one pass: enough to keep the kernels busy, few enough that the activations stay small.
# A token's bits don't depend on it.
READ_BLOCK = 512


class Reader:
    """A model and a cache of one sequence, which it makes hold whatever it is told to read.

    What the text has in common with the one read before is not computed again, nor what a
    PrefixCache has of it. The results are the same bits.
    """

    def __init__(self, model: Decoder, cache: Cache, prefixes: PrefixCache | None = None) -> None:
        """cache: of one sequence, without tokens."""
        self.model = model
        self.cache = cache
        self.prefixes = prefixes
        self.ids: list[int] = []  # the tokens that the cache holds

    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits (1, V) of the token after these, which the cache then holds."""
        new = list(ids)
        self._keep(new)
        for start in range(len(self.ids), len(new), READ_BLOCK):
            block = new[start : start + READ_BLOCK]
            logits = run(self.model, [block], self.cache)
            self.ids += block
        return logits[:, -1]

    def advanced(self, ids: Sequence[int]) -> None:
        """The cache holds these now: another than this reader has added or dropped tokens."""
        self.ids = list(ids)

    def _keep(self, new: list[int]) -> None:
        """Make the cache hold as much as can be had of `new`, but for the last token."""
        kept = common_length(self.ids, new[:-1])
        if kept < self.cache.shortest(0):
            kept = 0
        self.cache.truncate([kept])
        self.ids = new[:kept]
        found = None if self.prefixes is None else self.prefixes.longest(new[:-1])
        if found is not None and found.length > kept:
            self.cache.put(0, found)
            self.ids = new[: found.length]


def run(model: Decoder, ids: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """One pass over rows of the same number of tokens: the last one's logits, (B, 1, V)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(torch.tensor(ids, device=device), cache, last_only=True)
