"""torch's own attention and transformer layers, which say by their class what they compute.

A class that inherits from one of them and has a forward of its own is something else. Calls that
these swaps have no way for (weights asked for, nested tensors, keys that are added) go to torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops import contract
from llmcore.swap.instance import Swapped, has_hooks
from llmcore.swap.norms import LayerNorm
from llmcore.swap.structure import Found, Structure, draw


class MultiheadAttention(Swapped):
    """nn.MultiheadAttention, where no weights are asked for."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        own: Any = self
        if need_weights or not self._takes(query, key, value):
            return super().forward(  # type: ignore[misc]
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        q, k, v = self._project(query, key, value)
        # As torch reads it: the flag says what the mask holds, and is enough by itself.
        causal = is_causal and key_padding_mask is None
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask)
        p = own.dropout if own.training else 0.0
        y = ops.attention(
            q, k, v, mask=mask, causal=causal, q_offset=0 if causal else None, dropout_p=p
        )
        y = y.transpose(1, 2).flatten(2)
        out = own.out_proj.forward(y)
        return (out if own.batch_first else out.transpose(0, 1)), None

    def _takes(self, *inputs: Tensor) -> bool:
        own: Any = self
        dtype = own.out_proj.weight.dtype
        return (
            all(x.ndim == 3 and not x.is_nested and x.dtype == dtype for x in inputs)
            and dtype in contract.FLOATS
            and own.bias_k is None
            and not own.add_zero_attn
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v (B, H, T or S, D)."""
        own: Any = self
        alike = query is key and key is value
        inputs = [query, key, value]
        if not own.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if own._qkv_same_embed_dim and alike:
            parts = list(ops.linear(inputs[0], own.in_proj_weight, own.in_proj_bias).chunk(3, -1))
        else:
            if own._qkv_same_embed_dim:
                weights = own.in_proj_weight.chunk(3)
            else:
                weights = (own.q_proj_weight, own.k_proj_weight, own.v_proj_weight)
            biases = (None,) * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
            parts = [ops.linear(*part) for part in zip(inputs, weights, biases, strict=True)]
        return [x.unflatten(-1, (own.num_heads, own.head_dim)).transpose(1, 2) for x in parts]

    def _mask(
        self, q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Both masks as one of attention's: bool where both are, or added."""
        if mask is not None:
            if mask.ndim == 3:  # (B * H, T, S)
                mask = mask.view(q.shape[0], -1, q.shape[2], k.shape[2])
            mask = mask.logical_not() if mask.dtype == torch.bool else mask
        if padding is not None:
            padding = padding[:, None, None, :]
            padding = padding.logical_not() if padding.dtype == torch.bool else padding
        if mask is None or padding is None:
            return padding if mask is None else mask
        if mask.dtype == padding.dtype == torch.bool:
            return mask & padding
        return _added(mask, q) + _added(padding, q)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))


def multihead_attention(module: nn.Module) -> Found:
    return {} if _is(module, nn.MultiheadAttention) else None


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is one of torch's, and no subclass that computes something of its own."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def attention_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.MultiheadAttention)
    like = module.out_proj.weight
    widths = (module.embed_dim, module.kdim, module.vdim)
    batch, length = (2, 5) if module.batch_first else (5, 2)
    return tuple(draw(batch, length, w, like=like, seed=i) for i, w in enumerate(widths))


class Layer(Swapped):
    """What the two layers share: a branch that is added, and the norm before or behind it."""

    def _add_and_norm(self, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """norm(x + branch), and the sum."""
        fits = isinstance(norm, LayerNorm) and not has_hooks(norm) and norm._takes(branch)
        if not fits or x.dtype != branch.dtype:
            stream = x + branch
            return norm(stream), stream
        assert isinstance(norm, LayerNorm)
        parameters: Any = norm._parameters
        return ops.add_layer_norm(
            branch, x, parameters.get("weight"), parameters.get("bias"), norm._llmcore_eps
        )


class EncoderLayer(Layer):
    """nn.TransformerEncoderLayer, with each sum in one pass with the norm that follows it."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        own: Any = self
        if src.is_nested or not isinstance(own.self_attn, MultiheadAttention):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[misc]
        masks = _canonical(src, src_mask, src_key_padding_mask)
        if own.norm_first:
            branch = own._sa_block(own.norm1(src), *masks, is_causal=is_causal)
            x, stream = self._add_and_norm(src, branch, own.norm2)
            return stream + own._ff_block(x)
        branch = own._sa_block(src, *masks, is_causal=is_causal)
        x, _ = self._add_and_norm(src, branch, own.norm1)
        return self._add_and_norm(x, own._ff_block(x), own.norm2)[0]


class DecoderLayer(Layer):
    """nn.TransformerDecoderLayer, likewise."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Any:
        own: Any = self
        masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        memory_masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if own.norm_first:
            branch = own._sa_block(own.norm1(tgt), *masks)
            x, stream = self._add_and_norm(tgt, branch, own.norm2)
            branch = own._mha_block(x, memory, *memory_masks)
            x, stream = self._add_and_norm(stream, branch, own.norm3)
            return stream + own._ff_block(x)
        x, _ = self._add_and_norm(tgt, own._sa_block(tgt, *masks), own.norm1)
        branch = own._mha_block(x, memory, *memory_masks)
        x, _ = self._add_and_norm(x, branch, own.norm2)
        return self._add_and_norm(x, own._ff_block(x), own.norm3)[0]


def _canonical(
    src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Masks of one kind, as nn.TransformerEncoderLayer makes them: all added if one is."""
    kinds = [m.dtype for m in (mask, padding) if m is not None]
    if len(set(kinds)) < 2:
        return mask, padding

    def added(m: Tensor | None) -> Tensor | None:
        if m is None or m.dtype != torch.bool:
            return m
        return torch.zeros_like(m, dtype=src.dtype).masked_fill(m, float("-inf"))

    return added(mask), added(padding)


def encoder_layer(module: nn.Module) -> Found:
    return {} if _is(module, nn.TransformerEncoderLayer) else None


def decoder_layer(module: nn.Module) -> Found:
    return {} if _is(module, nn.TransformerDecoderLayer) else None


def layer_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    like = next(module.parameters())
    width = module.self_attn.embed_dim  # type: ignore[union-attr]
    x = draw(2, 2, width, like=like)  # type: ignore[arg-type]
    return (x,) if isinstance(module, nn.TransformerEncoderLayer) else (x, x.flip(0))


STRUCTURES = (
    Structure(
        "multihead_attention",
        MultiheadAttention,
        multihead_attention,
        attention_inputs,
        options={"need_weights": False},
    ),
    Structure("encoder_layer", EncoderLayer, encoder_layer, layer_inputs),
    Structure("decoder_layer", DecoderLayer, decoder_layer, layer_inputs),
)
