"""Reading text into a cache, block by block, and only what the cache doesn't hold already."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from llmcore.generation.prefix import PrefixCache, common_length
from llmcore.models.cache_base import Cache, Kept, Source
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
        self._keep(new[:-1])
        return self._go_on(new)

    def hold(self, ids: Sequence[int]) -> None:
        """Make the cache hold these, the logits being no matter."""
        new = list(ids)
        self._keep(new)
        if len(self.ids) < len(new):
            self._go_on(new)

    def turn_to(self, source: Source) -> None:
        """Read for another source from now on: no token of the last one's counts."""
        self.cache.truncate([0])
        self.cache.source = source
        self.ids = []

    def known(self, ids: Sequence[int]) -> Kept | None:
        """What the PrefixCache has of the beginning of a text."""
        return None if self.prefixes is None else self.prefixes.longest(ids)

    def _keep(self, ids: list[int]) -> None:
        """Make the cache hold as much of these as can be had without a pass, and no other token."""
        kept = common_length(self.ids, ids)
        if kept < self.cache.shortest(0):
            kept = 0
        self.cache.truncate([kept])
        known = self.known(ids)
        if known is not None and known.length > kept:
            self.cache.put(0, known)
            kept = known.length
        self.ids = ids[:kept]

    def _go_on(self, ids: list[int]) -> Tensor:
        """Read all of `ids` that the cache does not hold; there must be some."""
        for start in range(len(self.ids), len(ids), READ_BLOCK):
            block = ids[start : start + READ_BLOCK]
            logits = run(self.model, [block], self.cache)
            self.ids += block
        return logits[:, -1]


def run(
    model: Decoder, rows: Sequence[Sequence[int]], cache: Cache, *, last_only: bool = True
) -> Tensor:
    """One pass over the rows' new tokens, as many as each has: logits (B, T, V).

    last_only  those of each row's last token, (B, 1, V); else, behind a row's end they mean nothing
    """
    device = cache.device or model.device
    counts = [len(row) for row in rows]
    longest, mask = max(counts), None
    if min(counts) < longest:
        steps = torch.arange(longest, device=device)
        mask = steps < torch.tensor(counts, device=device)[:, None]
        rows = [[*row, *[0] * (longest - len(row))] for row in rows]
    # To enter it twice is a hundredth of a short pass.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        return model(torch.tensor(rows, device=device), cache, mask, last_only=last_only)


def together(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many of these to read in one pass, and how much of their beginnings, in common, before.

    One at least; more as long as what each has of its own makes a pass of a block at most, for
    such short passes take most of their time for reading the weights.
    """
    count, common, longest = 1, len(texts[0]) - 1, len(texts[0])
    for text in texts[1:]:
        shared = min(common, common_length(texts[0], text[:-1]))
        longest = max(longest, len(text))
        if (count + 1) * (longest - shared) > READ_BLOCK:
            break
        count, common = count + 1, shared
    return count, common
