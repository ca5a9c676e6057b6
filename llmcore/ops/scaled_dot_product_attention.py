"""scaled_dot_product_attention: torch's function of that name, mapped onto attention.

It has torch's signature and meaning, for swapping by name; what differs from `attention`:
    is_causal   query i attends to keys j <= i, whatever T and S (top-left), so q_offset is 0
    enable_gqa  must be True for fewer key/value heads than heads; otherwise leading axes broadcast
    axes        q (..., T, D), k (..., S, D), v (..., S, Dv) with any number of leading axes
Formula, dtypes, edge cases: as attention (a query with nothing to attend to gives 0, as torch's).
Errors: as attention; ValueError for attn_mask together with is_causal, as torch raises there.
Source: torch.nn.functional.scaled_dot_product_attention's documentation.
"""

from __future__ import annotations

from typing import Any

import torch

from llmcore.dispatch import MAPPED
from llmcore.ops.attention import OP, attention


def mapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Size, tuple[torch.Tensor, ...], dict[str, Any]]:
    """The result's leading axes; q, k, v and the options of the call of attention."""
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: given together with is_causal=True, expected one of the two")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim < 2:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected (..., length, D)")
    shape = leading(query, key, value, enable_gqa)
    qkv = (
        as_four_axes(query, shape),
        as_four_axes(key, shape, enable_gqa),
        as_four_axes(value, shape, enable_gqa),
    )
    mask = mask_of(attn_mask, (*shape, query.shape[-2], key.shape[-2]))
    options = {"mask": mask, "causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    return shape, qkv, {**options, "q_offset": 0}


def arguments(*args: Any, **options: Any) -> tuple[Any, ...]:
    """The arguments of attention's kernels."""
    _, qkv, mapped_options = mapped(*args, **options)
    return OP.arguments(*qkv, **mapped_options)


MAPPED["scaled_dot_product_attention"] = (OP, arguments)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention on llmcore's attention.

    query (..., H, T, D), key (..., G, S, D), value (..., G, S, Dv); attn_mask broadcastable to
    (..., H, T, S), bool (True = may attend) or float (added). Returns (..., H, T, Dv).

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    shape, qkv, options = mapped(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    y: torch.Tensor = attention(*qkv, **options)
    return y if len(shape) == 2 else y.reshape(*shape, *y.shape[-2:])


def leading(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> torch.Size:
    """The leading axes of the result; with enable_gqa its heads are query's alone."""
    cut = 3 if enable_gqa else 2
    inputs = {"query": query, "key": key, "value": value}
    for name, tensor in inputs.items():
        if tensor.ndim < cut:
            raise ValueError(f"{name}: got {tensor.ndim} axes, expected heads with enable_gqa")
    if query.shape[:-cut] == key.shape[:-cut] == value.shape[:-cut]:
        return query.shape[:-2]  # broadcast_shapes takes longer than a small call of attention
    try:
        shape = torch.broadcast_shapes(*(t.shape[:-cut] for t in inputs.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in inputs.items())
        hint = "" if enable_gqa else " (fewer key/value heads need enable_gqa=True)"
        raise ValueError(f"key: leading axes don't broadcast: {shapes}{hint}") from error
    return torch.Size((*shape, query.shape[-3])) if enable_gqa else shape


def as_four_axes(tensor: torch.Tensor, shape: torch.Size, own_heads: bool = False) -> torch.Tensor:
    """(..., length, D) as (B, H, length, D), its leading axes expanded to `shape`."""
    if own_heads:
        shape = torch.Size((*shape[:-1], tensor.shape[-3]))
    if len(shape) == 2 and tensor.shape[:-2] == shape:
        return tensor
    if len(shape) == 0:
        return tensor[None, None]
    tensor = tensor.expand(*shape, *tensor.shape[-2:])
    return tensor[None] if len(shape) == 1 else tensor.flatten(0, -4)


def mask_of(mask: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """attn_mask with four axes; without a copy unless it has more axes than that."""
    if mask is None or not isinstance(mask, torch.Tensor) or mask.ndim <= 3 or len(shape) == 4:
        return mask
    return mask.expand(shape).flatten(0, -4)
