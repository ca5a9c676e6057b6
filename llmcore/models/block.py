"""The one block of every model: attention, then a feed-forward network, each beside a norm.

    stream = stream + attention(norm(stream))            norm_placement "pre", or
    stream = norm(stream + attention(stream))            "post", or
    stream = stream + norm(attention(norm(stream)))      "both"

and the same with attention to a source, where there is one, and with the feed-forward network. Or

    stream = stream + attention(norm(stream)) + feed_forward(norm(stream))      "parallel"

A branch's result is not added where it is made but by the next norm, which is one fused pass
(`add_rms_norm`, `add_layer_norm`). So a block takes and gives two tensors: the residual stream,
and the branch that has still to be added to it (None behind a norm of the sum).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.models.cache_base import Cache, Source, Span
from llmcore.models.config import GATED, TransformerConfig
from llmcore.models.layers import Linear, Norm


@dataclass(frozen=True)
class Pass:
    """What all blocks of one forward pass share.

    span       positions and lengths of the new tokens
    rotation   cos and sin, float32 (T, R/2) or (B, T, R/2); None without rotary positions
    window_rotation   those of layers with a window
    bias       float, added to all scores: (1 or B, H, T, S); None without relative positions
    slopes     (H,), of ALiBi; None without
    cache      where keys and values are kept; None when nothing is
    source     what cross-attention attends to; None without
    cu_seqlens (documents + 1,): where packed documents end, over all B * T tokens; None without
    balance    mixtures of experts put their balance loss here, in training
    """

    span: Span
    rotation: tuple[Tensor, Tensor] | None = None
    window_rotation: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    cache: Cache | None = None
    source: Source | None = None
    cu_seqlens: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Self-attention, causal or both ways, with H query heads on G key/value heads.

    One matrix makes queries, keys and values, ((H + 2 G) D, C), in this order: one call, and one
    rotation for queries and keys together.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        self.layer, self.causal = layer, causal
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width, self.dropout = config.head_width, config.dropout
        window = config.window_of(layer)
        self.windowed = window is not None
        self.options: dict[str, Any] = {
            "window": None if window is None else (window - 1, 0 if causal else window - 1),
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
        }
        rows = (config.heads + 2 * config.kv_heads) * config.head_width
        self.qkv = Linear(config.width, rows, bias=config.bias or config.qkv_bias)
        self.q_norm = Norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_width) if config.qk_norm else None
        self.output = Linear(config.heads * config.head_width, config.width, bias=config.bias)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, new = x.shape[:2]
        heads = self.qkv(x).view(batch, new, -1, self.head_width).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q)[0], self.k_norm(k)[0]), dim=1)
        rotation = now.window_rotation if self.windowed else now.rotation
        if rotation is not None:
            qk = ops.rope(qk, *rotation)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        y = self._attend(q, k, v, now)
        return self.output(y.transpose(1, 2).reshape(batch, new, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        """(B, H, T, D) of queries like it, keys and values (B, G, T, D), and what came before."""
        if now.cu_seqlens is not None:
            rows, ends = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)], now.cu_seqlens
            y = ops.attention_varlen(
                rows[0], rows[1], rows[2], ends, ends, causal=self.causal, **self.options
            )
            return y.view(len(q), -1, self.heads, self.head_width).transpose(1, 2)
        options = self.options
        if now.bias is not None:
            options = {**options, "mask": now.bias}
        if now.slopes is not None:
            options = {**options, "alibi_slopes": now.slopes}
        if now.cache is not None:
            now.cache.store(self.layer, k, v, now.span)
            return now.cache.attend(self.layer, q, now.span, options)
        return ops.attention(
            q,
            k,
            v,
            causal=self.causal,
            kv_lengths=now.span.kv_lengths,
            q_offset=now.span.q_offset,
            dropout_p=self.dropout if self.training else 0.0,
            **options,
        )


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to all of a source's.

    The source's keys and values, one matrix (2 G D, C) of its hidden states, don't depend on the
    decoder's tokens: `read` makes them once for all passes.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width, self.dropout = config.head_width, config.dropout
        self.options: dict[str, Any] = {
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
        }
        bias, width = config.bias or config.qkv_bias, config.head_width
        self.q = Linear(config.width, config.heads * width, bias=bias)
        self.kv = Linear(config.width, 2 * config.kv_heads * width, bias=bias)
        self.output = Linear(config.heads * width, config.width, bias=config.bias)

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, S, D) of a source's hidden states (B, S, C)."""
        heads = self.kv(hidden).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        k, v = heads.chunk(2, dim=1)
        return k, v

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if now.source is None:
            raise ValueError("a decoder with cross-attention needs a source, got None")
        y = ops.attention(
            self._queries(x),
            now.source.keys[self.layer],
            now.source.values[self.layer],
            kv_lengths=now.source.lengths,
            dropout_p=self.dropout if self.training else 0.0,
            **self.options,
        )
        return self.output(y.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, source: Source) -> Tensor:
        """How much of each source token x (B, T, C) takes, (B, H, T, S): the definition."""
        q, k = self._queries(x), source.keys[self.layer]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2) * (self.options["scale"] or q.shape[-1] ** -0.5)
        if (softcap := self.options["softcap"]) is not None:
            scores = softcap * (scores / softcap).tanh()
        mask = None
        if source.lengths is not None:
            steps = torch.arange(k.shape[2], device=k.device)
            mask = (steps < source.lengths[:, None])[:, None, None]
        return ops.masked_softmax(scores, mask=mask)

    def _queries(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return self.q(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def activate(name: str, hidden: Tensor) -> Tensor:
    """The activation of this name; a gated one takes gate and value side by side, (..., 2 F)."""
    if name == "swiglu":
        return ops.swiglu(*hidden.chunk(2, dim=-1))
    if name == "geglu":
        gate, up = hidden.chunk(2, dim=-1)
        return ops.geglu(gate, up, "tanh")
    if name == "relu":
        return F.relu(hidden)
    if name == "silu":  # torch's own has other bits at the end of a tensor than inside
        return ops.swiglu(hidden, torch.ones_like(hidden))
    return ops.gelu(hidden, approximate="tanh" if name == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """Gated, down(silu(gate x) * up x) with gate and up in one matrix (2 F, C), or plain."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        rows = (2 if config.activation in GATED else 1) * config.feed_forward
        self.up = Linear(config.width, rows, bias=config.bias)
        self.down = Linear(config.feed_forward, config.width, bias=config.bias)

    def forward(self, x: Tensor, now: Pass | None = None) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down(activate(self.activation, self.up(x)))


class Experts(nn.Module):
    """A mixture of feed-forward networks: each token goes through the few that a router chooses.

    Their results are weighted by the router's softmax over the chosen ones (Mixtral, Jiang et al.,
    2024, section 2.1). In training the balance loss keeps a few experts from getting all tokens:
    E * sum_e (share of tokens that chose e) * (mean probability of e) (Fedus et al., 2021, eq. 4).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.chosen = config.experts_per_token
        self.router = Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        rows = x.flatten(0, -2)
        probabilities = ops.softmax(self.router(rows).float())
        weights, chosen = probabilities.topk(self.chosen)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(rows.dtype)
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):  # in their order: a token's sum has one too
            tokens, rank = (chosen == i).nonzero(as_tuple=True)
            part = expert(rows[tokens]) * weights[tokens, rank, None]
            y = y.index_add(0, tokens, part)
        if self.training:
            share = F.one_hot(chosen, len(self.experts)).sum(dim=1).float().mean(dim=0)
            loss = len(self.experts) * (share / self.chosen * probabilities.mean(dim=0)).sum()
            now.balance.append(loss)
        return y.view_as(x)


class Block(nn.Module):
    """One layer of a transformer."""

    def __init__(
        self, config: TransformerConfig, layer: int, *, causal: bool = True, cross: bool = False
    ) -> None:
        super().__init__()
        self.post, self.dropout = config.norm_placement == "post", config.dropout
        self.parallel = config.norm_placement == "parallel"
        both = config.norm_placement == "both"
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer, causal=causal)
        self.attention_after_norm = Norm(config) if both else None
        self.cross_attention = CrossAttention(config, layer) if cross else None
        self.cross_attention_norm = Norm(config) if cross else None
        self.cross_attention_after_norm = Norm(config) if cross and both else None
        self.feed_forward_norm = Norm(config)
        self.feed_forward = Experts(config) if config.experts else FeedForward(config)
        self.feed_forward_after_norm = Norm(config) if both else None

    def forward(
        self, stream: Tensor, branch: Tensor | None, now: Pass
    ) -> tuple[Tensor, Tensor | None]:
        """stream (B, T, C), branch (B, T, C) or None for nothing -> the same pair, one layer on."""
        beside = None  # the branches before it, of the same stream
        for norm, inner, after in self._parts():
            if self.post:
                stream, branch = norm(stream, self._dropped(inner(stream, now)))[0], None
            elif self.parallel:
                x, stream = norm(stream, branch)
                found = self._dropped(inner(x, now))
                beside, branch = found if beside is None else beside + found, None
            else:
                x, stream = norm(stream, branch)
                branch = inner(x, now)
                if after is not None:
                    branch, _ = after(branch)
                branch = self._dropped(branch)
        return stream, beside if self.parallel else branch

    def _parts(self) -> list[tuple[Any, Any, Any]]:
        """Of each branch: the norm before it (of the sum, placed "post"), itself, the norm after
        it."""
        parts = [
            (self.attention_norm, self.attention, self.attention_after_norm),
            (self.cross_attention_norm, self.cross_attention, self.cross_attention_after_norm),
            (self.feed_forward_norm, self.feed_forward, self.feed_forward_after_norm),
        ]
        return [part for part in parts if part[1] is not None]

    def _dropped(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
