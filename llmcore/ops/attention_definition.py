"""The definition of attention in plain PyTorch; its contract is `llmcore/ops/attention.py`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch

from llmcore.ops import contract
from llmcore.ops.masked_softmax import normalise

Window = tuple[int | None, int | None]
FARTHEST = 2**31
"""Positions and window sides beyond count as this: sums of them stay far inside of int64."""

Result: TypeAlias = Any
"""A tensor, or a pair with return_lse: Any, so that type checkers need not be told which."""


class Extra(NamedTuple):
    """The tensors of a call besides q, k, v; None where there is none.

    q_offset: an int, a tensor, or None, which means kv_lengths - T (S - T without kv_lengths).
    seed: int64, no axes, on the CPU; there exactly when options.dropout_p > 0.
    k_scale, v_scale: there exactly when k and v are int8.
    """

    mask: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    q_offset: torch.Tensor | int | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class Options(NamedTuple):
    """The numbers of a call, defaults resolved: `window` is None when it bounds nothing."""

    causal: bool
    window: Window | None
    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    return_lse: bool = False


def bounded(window: Any) -> Any:
    """`window` as Options holds it: a pair, or None when it bounds nothing."""
    if window is None:
        return None
    pair = tuple(window) if isinstance(window, list) else window
    if isinstance(pair, tuple):
        pair = tuple(nearest(side) for side in pair)
    return None if pair == (None, None) else pair


def nearest(number: Any) -> Any:
    """An int no further from 0 than FARTHEST; what is no int as it is."""
    if isinstance(number, int) and not -FARTHEST <= number <= FARTHEST:
        return FARTHEST if number > 0 else -FARTHEST
    return number


def default_scale(q: torch.Tensor) -> float:
    """1 / sqrt(D); 1 for what has no axes, which the check reports."""
    shape: tuple[int, ...] = getattr(q, "shape", ())
    return (shape[-1] or 1) ** -0.5 if len(shape) else 1.0


def stored(rows: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values that a cache's rows stand for."""
    wide = rows.to(dtype)
    return wide if scale is None else wide * scale.to(dtype)[..., None]


@contract.without_autocast
def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> Result:
    """The definition, in at least float32."""
    wide_q = contract.widen(q)
    wide_k, wide_v = stored(k, extra.k_scale, wide_q.dtype), stored(v, extra.v_scale, wide_q.dtype)
    if k.shape[1] != q.shape[1]:
        share = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.repeat_interleave(share, 1) for t in (wide_k, wide_v))

    scores = products(wide_q, wide_k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + bias(q, k, extra)
    allowed = visible(q, k, extra, options)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    sinks = None if extra.sinks is None else extra.sinks.to(scores.dtype)[:, None, None]
    weights, lse = normalise(scores, sinks)
    if extra.seed is not None:
        keep = kept(extra.seed.to(q.device), weights.shape, options.dropout_p)
        weights = weights.masked_fill(~keep, 0.0) / (1 - options.dropout_p)
    y = combine(weights, wide_v, allowed).to(q.dtype)
    return (y, lse) if options.return_lse else y


def positions(q: torch.Tensor, k: torch.Tensor, extra: Extra) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute positions of the queries, (B or 1, 1, T, 1), and of the keys, (S)."""
    offset = extra.q_offset
    if offset is None:
        lengths = extra.kv_lengths
        offset = (k.shape[2] if lengths is None else lengths.clamp(0, k.shape[2])) - q.shape[2]
    query = torch.arange(q.shape[2], device=q.device)[:, None]
    if isinstance(offset, torch.Tensor):
        offset = offset[:, None, None, None]
    else:
        query = query[None, None]
    return query + offset, torch.arange(k.shape[2], device=q.device)


def bias(q: torch.Tensor, k: torch.Tensor, extra: Extra) -> torch.Tensor | float:
    """What is added to the scores: the float mask and ALiBi's distances."""
    total: torch.Tensor | float = 0.0
    if extra.alibi_slopes is not None:
        query, key = positions(q, k, extra)
        wide = torch.promote_types(q.dtype, torch.float32)
        slopes = extra.alibi_slopes.to(wide).reshape(-1, q.shape[1], 1, 1)
        total = total - slopes * (query - key).abs()
    if extra.mask is not None and extra.mask.dtype != torch.bool:
        total = total + extra.mask
    return total


def visible(
    q: torch.Tensor, k: torch.Tensor, extra: Extra, options: Options
) -> torch.Tensor | None:
    """Which query may attend to which key, broadcastable to (B, H, T, S); None: each to all."""
    parts = []
    if extra.kv_lengths is not None:
        keys = torch.arange(k.shape[2], device=q.device)
        parts.append(keys < extra.kv_lengths[:, None, None, None])
    if options.causal or options.window is not None:
        query, key = positions(q, k, extra)
        left, right = options.window or (None, None)
        if options.causal:
            parts.append(key <= query)
        if left is not None:
            parts.append(key >= query - left)
        if right is not None:
            parts.append(key <= query + right)
    if extra.mask is not None and extra.mask.dtype == torch.bool:
        parts.append(extra.mask)
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k.T, in the backward pass of which a score without gradient contributes nothing.

    (0 * NaN is NaN: so the gradients see the finite values only, and the result all of them.)
    """
    finite_q, finite_k = q.isfinite(), k.isfinite()
    if contract.is_known(finite_q) and finite_q.all() and finite_k.all():
        return q @ k.mT
    finite = q.where(finite_q, 0.0) @ k.where(finite_k, 0.0).mT
    return finite + (q @ k.mT - finite).detach()


def combine(weights: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """weights @ v, in which a key that a query may not attend to contributes nothing."""
    finite = v.isfinite()
    if allowed is None or (contract.is_known(finite) and finite.all()):
        return weights @ v
    seen = allowed.to(v.dtype).expand(weights.shape)
    nan, high, low = (
        seen @ kind.to(v.dtype) > 0 for kind in (v.isnan(), v == math.inf, v == -math.inf)
    )
    y = weights @ v.where(finite, 0.0)
    seen_infinite = torch.where(high, math.inf, torch.where(low, -math.inf, 0.0))
    return y + torch.where(nan | (high & low), math.nan, seen_infinite)


def kept(seed: torch.Tensor, shape: torch.Size, dropout_p: float) -> torch.Tensor:
    """Which weights (B, H, T, S) dropout keeps: the hash of the docstring, in int64."""
    batch, heads, rows, keys = shape
    row = torch.arange(batch * heads * rows, device=seed.device).reshape(batch, heads, rows, 1)
    key = torch.zeros_like(seed)
    for part in (seed, seed >> 32, row, row >> 32):
        key = mix(key ^ (part & 0xFFFFFFFF))
    hashed = mix(key + torch.arange(keys, device=seed.device) * 0x9E3779B9)
    return hashed >= int(dropout_p * 2**32)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of the low 32 bits: int64 in, 0 to 2^32 - 1 out."""
    x = x & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    # The constant less 2^32, so that int64 holds the product; the low 32 bits are the same.
    x = (x * (0x846CA68B - 2**32)) & 0xFFFFFFFF
    return x ^ (x >> 16)
