"""Blocks one behind the other: tokens' vectors in, hidden states out.

    positions -> (norm) -> block x layers -> norm

Padding never reaches the blocks' arithmetic: the tokens that count are moved to the front of their
row (`Front`), the blocks see lengths instead of a mask, and results are moved back.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmcore.models.block import Block, Pass
from llmcore.models.cache_base import Cache, Source, Span
from llmcore.models.config import TransformerConfig
from llmcore.models.layers import Norm
from llmcore.models.positions import RelativePositions, alibi_slopes, rotations, sinusoids
from llmcore.ops.attention_varlen import places


@dataclass(frozen=True)
class Front:
    """The tokens of a padded batch that count, at the front of their rows.

    counts  (B,) int64: how many of each row
    order   (B, T) int64: where each column of the front comes from
    """

    counts: Tensor
    order: Tensor

    @classmethod
    def of(cls, mask: Tensor, like: Tensor, name: str = "attention_mask") -> "Front":
        """Of a mask (B, T), bool or 0/1: False is padding; ValueError for another shape."""
        if mask.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of ids {tuple(like.shape)}, got {tuple(mask.shape)}"
            )
        mask = mask.bool()
        return cls(mask.sum(dim=1), (~mask).to(torch.int8).argsort(dim=1, stable=True))

    def front(self, tokens: Tensor) -> Tensor:
        """(B, T) with what counts in front."""
        return tokens.gather(1, self.order)

    def back(self, hidden: Tensor) -> Tensor:
        """(B, T, C) with every token in its own column again."""
        return hidden.gather(1, self.order.argsort(dim=1)[..., None].expand_as(hidden))

    def last(self, hidden: Tensor) -> Tensor:
        """(B, 1, C): of each row's last token that counts."""
        last = (self.counts - 1).clamp(min=0)[:, None, None]
        return hidden.gather(1, last.expand(-1, -1, hidden.shape[-1]))


class Stack(nn.Module):
    """What the three models have in common.

    checkpoint_blocks   in training, a block's activations are not kept but computed again
    """

    def __init__(self, config: TransformerConfig, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.add_blocks(config, causal=causal, cross=cross)

    def add_blocks(self, config: TransformerConfig, *, causal: bool, cross: bool = False) -> None:
        """causal: tokens don't see later ones; cross: blocks attend to a source as well."""
        self.config, self.causal, self.cross = config, causal, cross
        self.checkpoint_blocks = False
        self.position_embedding: nn.Embedding | None = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.relative: RelativePositions | None = None
        if config.positions == "relative":
            self.relative = RelativePositions(config, causal=causal)
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(
            Block(config, layer, causal=causal, cross=cross) for layer in range(config.layers)
        )
        self.norm = None if config.norm_placement == "post" else Norm(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not packed, and so of hidden states."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attention_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attention_norm.weight.device

    def run(
        self,
        vectors: Tensor,
        counts: Tensor | None = None,
        *,
        cache: Cache | None = None,
        source: Source | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (B, T, C) of the tokens' vectors (B, T, C), and balance losses of experts.

        counts      (B,): how many tokens of each row count, the first ones; None: all
        cache       the tokens before these; it then holds these too
        source      what cross-attention attends to; None: the cache's
        cu_seqlens  (documents + 1,): the B * T tokens are packed documents that end there

        ValueError for too long a text, and for what documents don't go with.
        """
        if cu_seqlens is not None:
            self._check_packed(cache, counts)
        new = vectors.shape[1]
        span = self._span(vectors, counts) if cache is None else cache.reserve(new, vectors, counts)
        positions = span.positions
        if cu_seqlens is not None:
            positions = places(vectors.flatten(0, 1), cu_seqlens)[1].view(vectors.shape[:2])
            if not torch.compiler.is_compiling():  # a graph doesn't know the lengths
                self._check_length(int(cu_seqlens.diff().max()))
        elif cache is None:
            self._check_length(new)
        stream = self._placed(vectors, positions)
        now = self._pass(span, positions, stream, cache, source, cu_seqlens)
        branch = None
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                stream, branch = checkpoint(block, stream, branch, now, use_reentrant=False)
            else:
                stream, branch = block(stream, branch, now)
        hidden = stream if self.norm is None else self.norm(stream, branch)[0]
        if cache is not None:
            cache.commit(span)
        return hidden, now.balance

    def _placed(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """The vectors with what is added to them for their positions, normed, dropped."""
        if self.position_embedding is not None:
            vectors = vectors + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            vectors = vectors + sinusoids(self.config, positions).to(vectors.dtype)
        if self.embedding_norm is not None:
            vectors, _ = self.embedding_norm(vectors)
        return F.dropout(vectors, self.config.dropout, self.training and self.config.dropout > 0)

    def _pass(
        self,
        span: Span,
        positions: Tensor,
        stream: Tensor,
        cache: Cache | None,
        source: Source | None,
        cu_seqlens: Tensor | None,
    ) -> Pass:
        config, rotation, windowed = self.config, None, None
        if config.positions == "rope":
            rotation = windowed = rotations(config, positions)
            if config.window_rope_theta is not None:
                windowed = rotations(config, positions, config.window_rope_theta)
        bias = slopes = None
        if self.relative is not None:
            steps = torch.arange(stream.shape[1], device=stream.device)
            offset = span.q_offset
            queries = steps + (offset if isinstance(offset, int) else offset[:, None])
            bias = self.relative(queries, torch.arange(span.end, device=stream.device))
        elif config.positions == "alibi":
            slopes = alibi_slopes(config.heads, stream.device)
        if source is None and cache is not None:
            source = cache.source
        return Pass(span, rotation, windowed, bias, slopes, cache, source, cu_seqlens)

    def _span(self, vectors: Tensor, counts: Tensor | None) -> Span:
        """Where tokens go without a cache."""
        new = vectors.shape[1]
        return Span(0, new, counts, 0, new, vectors.device)

    def _check_length(self, length: int) -> None:
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens exceed the context of {self.config.context_length}")

    def _check_packed(self, cache: Cache | None, counts: Tensor | None) -> None:
        positions = self.config.positions
        for present, what in (
            (cache is not None, "a cache"),
            (counts is not None, "a mask of padding"),
            (self.cross, "cross-attention"),
            (positions in ("alibi", "relative"), f"{positions} positions"),
        ):
            if present:
                raise ValueError(f"cu_seqlens: packed documents don't go with {what}")
