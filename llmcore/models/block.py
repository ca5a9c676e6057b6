"""The one block of every model: attention, then a feed-forward network, each behind a norm.

    stream = stream + attention(norm(stream))
    stream = stream + feed_forward(norm(stream))

A branch's result is not added where it is made but by the next norm, which is one fused pass
(`add_rms_norm`, `add_layer_norm`). So a block takes and gives two tensors: the residual stream,
and the branch that has still to be added to it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.models.cache_base import Cache, Span
from llmcore.models.config import TransformerConfig
from llmcore.ops.packed_weight import PackedWeight


class Packable(nn.Module):
    """A module whose weight is a parameter, or a PackedWeight in its place, which is none."""

    weight: nn.Parameter | PackedWeight

    @property
    def parameter(self) -> nn.Parameter:
        """The weight; ValueError when it is packed."""
        if isinstance(self.weight, PackedWeight):
            raise ValueError(
                "the model's weights are packed, for inference: load it without `weights`"
            )
        return self.weight

    def pack(self, weight: PackedWeight) -> None:
        """Take this weight in the place of the parameter."""
        del self.weight
        self.weight = weight


class Linear(Packable, nn.Linear):  # type: ignore[misc]
    """y = x Wᵀ + b through `ops.linear`; parameters as in torch: weight (out, in), bias (out,)."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Embedding(Packable, nn.Embedding):  # type: ignore[misc]
    """A row of the weight (V, C) for each token."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return self.weight.rows(input)
        return super().forward(input)


class Norm(nn.Module):
    """RMS norm (weight) or layer norm (weight, bias) over the last axis, alone or after an add."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias: nn.Parameter | None = None
        if config.norm == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(stream + branch) and the sum itself, both (B, T, C)."""
        if self.bias is None:
            if branch is None:
                return ops.rms_norm(stream, self.weight, self.eps), stream
            return ops.add_rms_norm(branch, stream, self.weight, self.eps)
        if branch is None:
            return ops.layer_norm(stream, self.weight, self.bias, self.eps), stream
        return ops.add_layer_norm(branch, stream, self.weight, self.bias, self.eps)


def rotations(config: TransformerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at positions (...), float32 (..., D/2) each."""
    # In float32 whatever the model's dtype: the weights were trained with these very angles.
    pairs = torch.arange(0, config.head_width, 2, device=positions.device)
    frequencies = 1.0 / config.rope_theta ** (pairs.float() / config.head_width)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Pass:
    """What all blocks of one forward pass share.

    span      positions and lengths of the new tokens
    rotation  cos and sin, float32 (T, D/2) or (B, T, D/2); None with learned positions
    cache     where keys and values are kept; None when nothing is
    """

    span: Span
    rotation: tuple[Tensor, Tensor] | None
    cache: Cache | None


class Attention(nn.Module):
    """Causal self-attention with H query heads on G key/value heads.

    One matrix makes queries, keys and values, ((H + 2 G) D, C), in this order: one call, and one
    rotation for queries and keys together.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.head_width
        self.window = config.attention_window
        rows = (config.heads + 2 * config.kv_heads) * config.head_width
        self.qkv = Linear(config.width, rows, bias=config.bias)
        self.output = Linear(config.heads * config.head_width, config.width, bias=config.bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, new = x.shape[:2]
        heads = self.qkv(x).view(batch, new, -1, self.head_width).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if now.rotation is not None:
            qk = ops.rope(qk, *now.rotation)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        if now.cache is None:
            lengths, offset = now.span.kv_lengths, now.span.q_offset
            y = ops.attention(
                q, k, v, causal=True, window=self.window, kv_lengths=lengths, q_offset=offset
            )
        else:
            now.cache.store(self.layer, k, v, now.span)
            y = now.cache.attend(self.layer, q, now.span)
        return self.output(y.transpose(1, 2).reshape(batch, new, -1))


class FeedForward(nn.Module):
    """Gated, down(silu(gate x) * up x) with gate and up in one matrix (2 F, C), or plain."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        rows = (2 if self.gated else 1) * config.feed_forward
        self.up = Linear(config.width, rows, bias=config.bias)
        self.down = Linear(config.feed_forward, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.up(x)
        if self.gated:
            return self.down(ops.swiglu(*hidden.chunk(2, dim=-1)))
        return self.down(ops.gelu(hidden, approximate="tanh"))


class Block(nn.Module):
    """One layer of the transformer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, stream: Tensor, branch: Tensor | None, now: Pass) -> tuple[Tensor, Tensor]:
        """stream (B, T, C), branch (B, T, C) or None for nothing -> the same pair, one layer on."""
        x, stream = self.attention_norm(stream, branch)
        branch = self.attention(x, now)
        x, stream = self.feed_forward_norm(stream, branch)
        return stream, self.feed_forward(x)
