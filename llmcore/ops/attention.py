"""attention: y_i = sum_j w_ij v_j over the keys j that query i may attend to, w a softmax.

For the query i of batch b and head h, at the absolute position p = q_offset_b + i:
    s_ij = scale * q_i . k_j              scale: 1 / sqrt(D) unless given; head h uses the key/value
                                          head h // (H / G)
    s_ij = softcap * tanh(s_ij / softcap)                             with softcap
    s_ij = s_ij - slope_h * |p - j|                                   with alibi_slopes
    s_ij = s_ij + mask_ij                                             with a float mask
    w_ij = exp(s_ij) / (sum over attended j of exp(s_ij) + exp(sink_h))
    w_ij = w_ij / (1 - dropout_p) or 0                                with dropout, see below
    lse_i = log(that denominator), before dropout
Query i may attend to key j where all of these hold:
    j < kv_length_b;  the bool mask is True;  j <= p with causal;  p - left <= j <= p + right with
    window = (left, right), None being unbounded.
q_offset is kv_length_b - T unless given: queries are the last positions, as in FlashAttention 2.
An int q_offset and the sides of a window count as the nearest number from -2^31 to 2^31.

Tensors (D contiguous in all, any other strides):
    q             (B, H, T, D)    float32, bfloat16, float16 or float64
    k, v          (B, G, S, D), (B, G, S, Dv)   q's dtype, bfloat16, or int8; H a multiple of G
    k_scale, v_scale   (B, G, S)    float32 or q's dtype; with int8, and only then
    mask          broadcastable to (B, H, T, S); bool (True = may attend), float32 or q's dtype
    kv_lengths    (B)             int32 or int64, 0 to S; beyond, the nearest of these
    q_offset      (B)             int32 or int64, or one int
    sinks         (H)             q's dtype or float32
    alibi_slopes  (H) or (B, H)   q's dtype or float32
    y             (B, H, T, Dv)   q's dtype
    lse           (B, H, T)       float32 (float64 for float64), differentiable
Float32: scores, softmax, sums; y is rounded once. Kernels for half types may round the weights w to
the dtype before the second product, as FlashAttention does (the yardstick allows for it).
k and v as a cache keeps them: in int8 a row stands for its integers times its scale (what
quantize_rows makes), which kernels may multiply scores and weights by. Beside a q of another dtype
they are exact: nothing but y is rounded to q's dtype. For inference: kernels have no gradient then.
In torch.autocast q, k and v are cast to its dtype; mask, sinks and slopes are not.

A key that a query may not attend to contributes exactly nothing, forward and backward, whatever it
holds: NaN and inf in k or v past kv_lengths, in the causal future, outside the window or where a
bool mask is False reach no result, and no gradient but that of a query that does attend to them. (A
float mask of -inf is different: it is added, so a NaN score stays NaN.) NaN that is attended to
spreads as in torch's arithmetic, as does inf; an attended inf in v counts even with a weight of 0.
Edge cases: a query that may attend to nothing, or only to scores of -inf, has y = 0, zero gradient,
and lse = -inf (with sinks, the sink). Any of B, T, S, H, Dv may be 0.
Errors: TypeError for a dtype, ValueError for a shape, a device, or an option out of range; all name
the argument.

Dropout is counter-based, so that every backend and every backward pass drops the same weights.
`seed`, 0 to 2^62 - 1, is drawn from torch's default CPU generator for each call (torch.manual_seed
makes it reproducible); it is a tensor so that compiled graphs draw it too. All in uint32, wrapping:
    mix(x):  x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
    row  = (b * H + h) * T + i, in 64 bits
    key  = mix(mix(mix(mix(seed's low 32 bits) ^ its high) ^ row's low 32 bits) ^ its high)
    hash = mix(key + j * 0x9E3779B9)
    w_ij is kept where hash >= floor(dropout_p * 2^32)
Source: Dao, FlashAttention-2, 2023, section 3.1; sinks: OpenAI, gpt-oss, 2025; ALiBi: Press et al.,
2021; softcap: Gemma 2, 2024, section 2; mix: Wellons, lowbias32, 2018.

Kernels: forward(q, k, v, extra: Extra, options: Options) -> y, or (y, lse) with options.return_lse;
backward(dy, dlse, y, lse, need_dmask, need_dslopes, q, k, v, extra, options) -> dq, dk, dv, dsinks,
dmask, dslopes, the last three in float32, and None where there are none or they are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llmcore import gpu_table
from llmcore.dispatch import Op, triton_candidate
from llmcore.ops import attention_native, contract
from llmcore.ops.attention_definition import (
    Extra,
    Options,
    Result,
    Window,
    bounded,
    default_scale,
    nearest,
    reference,
)
from llmcore.ops.quantize_rows import quantize_rows
from llmcore.ops.sample import Draw, Sample


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    optional = {"sinks": extra.sinks, "alibi_slopes": extra.alibi_slopes}
    contract.check_floating(optional, q=q)
    check_stored(q, extra, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            axes = "(B, H, T, D)" if name == "q" else "(B, G, S, D)"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {axes}")
    check_heads(q, k, "k")
    batch, heads, rows, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, expected ({batch}, G, S, {width}), as q has B and D"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}, expected {tuple(k.shape[:3])} and Dv, as k"
        )
    check_scales(q, k, extra)
    contract.check_mask(extra.mask, (batch, heads, rows, k.shape[2]), q, "q")
    check_extra(q, extra)
    check_options(options)


def check_stored(q: torch.Tensor, extra: Extra, **tensors: torch.Tensor) -> None:
    """Keys and values must be of q's dtype, bfloat16, or int8 with scales; else TypeError."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (q.dtype, torch.bfloat16, torch.int8):
            raise TypeError(
                f"{name}: got {tensor.dtype}, expected {q.dtype}, the dtype of q, torch.bfloat16 "
                "or torch.int8"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name}: got {tensor.dtype}, expected {first.dtype}, the dtype of "
                f"{next(iter(tensors))}"
            )
        contract.check_device(q, "q", **{name: tensor})
    for name, scale in (("k_scale", extra.k_scale), ("v_scale", extra.v_scale)):
        if first.dtype == torch.int8 and scale is None:
            raise TypeError(f"{name}: expected a tensor with torch.int8, got NoneType")
        if first.dtype != torch.int8 and scale is not None:
            raise TypeError(f"{name}: expected None with {first.dtype}: it is for torch.int8")


def check_scales(q: torch.Tensor, k: torch.Tensor, extra: Extra) -> None:
    """Raises TypeError or ValueError for scales of keys and values that don't fit."""
    scales = {"k_scale": extra.k_scale, "v_scale": extra.v_scale}
    contract.check_floating(scales, q=q)
    contract.check_dtype(q, "q", or_float32=True, **scales)
    contract.check_shape(k.shape[:3], "one for each row", **scales)


def check_heads(q: torch.Tensor, k: torch.Tensor, name: str) -> None:
    """H must be a multiple of G, each on axis 1, else ValueError."""
    heads, groups = q.shape[1], k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{name}: got {groups} key/value heads, expected a divisor of q's {heads} heads"
        )


def check_extra(q: torch.Tensor, extra: Extra) -> None:
    """Raises TypeError or ValueError for lengths, offsets, sinks and slopes that don't fit q."""
    batch, heads = q.shape[:2]
    contract.check_integers(q, "q", (batch,), "one for each sequence", kv_lengths=extra.kv_lengths)
    if isinstance(extra.q_offset, torch.Tensor):
        contract.check_integers(q, "q", (batch,), "one for each sequence", q_offset=extra.q_offset)
    elif extra.q_offset is not None and not isinstance(extra.q_offset, int | torch.SymInt):
        raise TypeError(
            f"q_offset: expected an int or a tensor, got {type(extra.q_offset).__name__}"
        )
    small = {"sinks": extra.sinks, "alibi_slopes": extra.alibi_slopes}
    contract.check_dtype(q, "q", or_float32=True, **small)
    contract.check_shape((heads,), "one for each head of q", sinks=extra.sinks)
    slopes = extra.alibi_slopes
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: got shape {tuple(slopes.shape)}, expected ({heads},) or "
            f"({batch}, {heads}), one for each head of q"
        )


def check_options(options: Options) -> None:
    """Raises TypeError or ValueError for numbers out of range."""
    contract.check_number(-math.inf, math.inf, scale=options.scale)
    contract.check_number(0, 1, dropout_p=options.dropout_p)
    if options.dropout_p == 1:
        raise ValueError("dropout_p: got 1, expected a number below, for something must be kept")
    if options.softcap is not None:
        contract.check_number(0, math.inf, softcap=options.softcap)
        if options.softcap == 0:
            raise ValueError("softcap: got 0, expected a positive number or None")
    if options.window is None:
        return
    sides = options.window
    if not isinstance(sides, tuple) or len(sides) != 2:
        raise TypeError(f"window: got {sides!r}, expected a pair (left, right)")
    for side in sides:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"window: got {sides}, expected two ints of at least 0, or None")


def arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    q_offset: torch.Tensor | int | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Extra, Options]:
    """Defaults resolved, tensors as autocast wants them, a seed drawn where there is dropout."""
    q, k, v = contract.autocast(q, k, v)
    seed = draw_seed() if dropout_p else None
    extra = Extra(mask, kv_lengths, nearest(q_offset), sinks, alibi_slopes, seed, k_scale, v_scale)
    scale = default_scale(q) if scale is None else scale
    options = Options(bool(causal), bounded(window), scale, softcap, dropout_p, return_lse)
    return q, k, v, extra, options


def draw_seed() -> torch.Tensor:
    """A seed for one call's dropout."""
    return torch.randint(2**62, ())


def call_key(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> Any:
    """What the check and the choice depend on.

    Neither the values of tensors or of an int offset, nor, where no mask must fit to it, the number
    of keys: all steps of decoding have one key.
    """
    mask, kv_lengths, offset, sinks, slopes, _, k_scale, v_scale = extra
    try:
        (batch, heads, rows, width), (k_batch, groups, keys, k_width) = q.shape, k.shape
        v_batch, v_groups, values, v_width = v.shape
        key = (
            *(batch, heads, width, q.dtype, q.device, q.layout),
            *(k_batch, groups, k_width, k.dtype, k.device, k.layout),
            *(v_batch, v_groups, v_width, v.dtype, v.device, v.layout),
            *(keys == values, options, *map(type, options), type(offset)),
            None if options.window is None else contract.types_key(options.window),
        )
        offsets = offset if isinstance(offset, torch.Tensor) else None
        has_scales = k_scale is not None or v_scale is not None
        if (mask is None and kv_lengths is None and offsets is None and not has_scales) and (
            sinks is None and slopes is None and k.dtype == q.dtype
        ):
            return key
        tensors = map(contract.tensor_key, (mask, kv_lengths, offsets, sinks, slopes))
        wanted: tuple[Any, ...]
        wanted = contract.wants_gradient(mask), contract.wants_gradient(slopes)
        if k.dtype != q.dtype or has_scales:
            places = (k_batch, groups, keys)
            scales = tuple(scale_key(scale, places) for scale in (k_scale, v_scale))
            wanted = (*wanted, scales, attention_native.wants_any_gradient(q, k, v, extra))
        return (*key, *tensors, None if mask is None else (rows, keys), wanted)
    except (AttributeError, TypeError, ValueError):
        return None


def scale_key(scale: torch.Tensor | None, rows: tuple[int, int, int]) -> Any:
    """What the check and the choice depend on in the scales of so many rows."""
    if scale is None:
        return None
    return (tuple(scale.shape) == rows, scale.dtype, scale.device, scale.layout)


def samples(draw: Draw) -> Iterator[Sample]:
    yield from plain_samples(draw)
    yield from masked_samples(draw)
    yield from extra_samples(draw)
    yield from cache_samples(draw)


def draw_qkv(draw: Draw, *sizes: int) -> tuple[torch.Tensor, ...]:
    """q, k, v of sizes B, H, G, T, S, D, Dv."""
    batch, heads, groups, rows, keys, width, value_width = sizes
    return (
        draw.normal(batch, heads, rows, width),
        draw.normal(batch, groups, keys, width),
        draw.normal(batch, groups, keys, value_width),
    )


def plain_samples(draw: Draw) -> Iterator[Sample]:
    rows, keys = draw.size(1, 90), draw.size(1, 200)
    for sizes in (
        (2, 3, 3, rows, keys, 64, 64),
        (1, 4, 2, rows, rows, 32, 32),
        (2, 6, 2, 1, keys, 64, 64),
        (1, 2, 1, 17, 130, 80, 80),
        (1, 2, 2, 33, 65, 24, 40),
        (1, 1, 1, 7, 9, 5, 3),
        (1, 2, 2, 65, 129, 128, 128),
    ):
        for causal in (False, True):
            name = "x".join(map(str, sizes)) + ("_causal" if causal else "")
            yield Sample(name, draw_qkv(draw, *sizes), {"causal": causal})
    for name, sizes in (
        ("no_queries", (1, 2, 2, 0, 5, 8, 8)),
        ("no_keys", (1, 2, 2, 5, 0, 8, 8)),
        ("no_batch", (0, 2, 2, 5, 5, 8, 8)),
        ("more_queries_than_keys", (1, 2, 2, 40, 9, 16, 16)),
    ):
        options = {"causal": True, "return_lse": True}
        yield Sample(name, draw_qkv(draw, *sizes), options)
    strided = tuple(t.transpose(1, 2) for t in draw_qkv(draw, 2, 21, 21, 3, 3, 16, 16))
    yield Sample("strided", strided, {"causal": True})
    yield Sample("one_buffer", draw.normal(2, 3, 13, 48).chunk(3, -1), {"return_lse": True})


def masked_samples(draw: Draw) -> Iterator[Sample]:
    rows, keys = draw.size(2, 50), draw.size(40, 150)
    sizes = (2, 4, 2, rows, keys, 32, 32)
    q, k, v = draw_qkv(draw, *sizes)
    lengths = draw.integers(1, keys, 2)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:], v[row, :, length:] = math.nan, math.nan
    options: dict[str, Any] = {"kv_lengths": lengths, "return_lse": True}
    yield Sample("lengths_nan_tail", (q, k, v), options)
    yield Sample("lengths_causal", (q, k, v), {**options, "causal": True})
    offset = draw.integers(0, keys, 2)
    moved = {**options, "causal": True, "q_offset": offset, "window": (9, None)}
    yield Sample("lengths_offset_window", (q, k, v), moved)
    none = torch.tensor([0, keys + 3], dtype=torch.int32)
    yield Sample("length_0", draw_qkv(draw, *sizes), {"kv_lengths": none, "causal": True})
    for window in ((5, 0), (0, 0), (None, 3), (7, 4)):
        options = {"window": window, "q_offset": 20, "return_lse": True}
        yield Sample(f"window_{window[0]}_{window[1]}", draw_qkv(draw, *sizes), options)
    seen = draw.chance(0.6, 2, 1, rows, keys)
    seen[0, 0, 0] = False
    yield Sample("bool_mask_empty_row", draw_qkv(draw, *sizes), {"mask": seen, "return_lse": True})
    padding = draw.chance(0.7, 2, 1, 1, keys)
    yield Sample("padding", draw_qkv(draw, *sizes), {"mask": padding, "causal": True})
    added = draw.normal(4, rows, keys).masked_fill(draw.chance(0.2, 4, rows, keys), -math.inf)
    yield Sample("float_mask", draw_qkv(draw, *sizes), {"mask": added})
    options = {"mask": draw.normal(1, 4, 1, keys), "causal": True}
    yield Sample("float32_mask", draw_qkv(draw, *sizes), options, keep=("mask",))
    q, k, v = draw_qkv(draw, 1, 2, 1, 12, 12, 16, 16)
    k[:, :, 9], v[:, :, 9] = math.nan, math.inf
    hidden = torch.ones(12, 12, dtype=torch.bool).tril()
    hidden[9:, 9] = False
    yield Sample("hidden_nan", (q, k, v), {"mask": hidden, "return_lse": True})


def extra_samples(draw: Draw) -> Iterator[Sample]:
    rows, keys = draw.size(2, 50), draw.size(40, 150)
    sizes = (2, 4, 2, rows, keys, 32, 32)
    q, k, v = draw_qkv(draw, *sizes)
    yield Sample("scale", (q, k, v), {"scale": 0.31})
    # A sum of one sign that a half type could not hold: its steps get larger than the terms. Its
    # lse is near 7: a backward pass that subtracts it from each score in float32 loses bits.
    long_q, long_k, long_v = draw_qkv(draw, 1, 1, 1, 2, 1100, 16, 4)
    yield Sample("long_sum", (long_q / 4, long_k, long_v.abs()))
    yield Sample("softcap", (q * 3, k, v), {"softcap": 5.0, "causal": True, "return_lse": True})
    sinks: dict[str, Any] = {"sinks": draw.normal(4), "causal": True, "return_lse": True}
    yield Sample("sinks", (q, k, v), sinks)
    options = {**sinks, "kv_lengths": torch.tensor([0, 3])}
    yield Sample("sinks_float32_length_0", (q, k, v), options, keep=("sinks",))
    alibi: dict[str, Any] = {"alibi_slopes": draw.normal(4).abs() / 8, "causal": True}
    yield Sample("alibi", (q, k, v), alibi)
    by_row = {"alibi_slopes": draw.normal(2, 4).abs() / 8, "q_offset": 3}
    yield Sample("alibi_by_sequence", (q, k, v), by_row, keep=("alibi_slopes",))
    for p in (0.1, 0.7):
        options = {"dropout_p": p, "causal": True, "return_lse": True}
        yield Sample(f"dropout_{p}", (q, k, v), options)
    options = {**sinks, **alibi, "softcap": 20.0, "window": (30, 0), "dropout_p": 0.2}
    options["mask"] = draw.normal(keys)
    yield Sample("everything", (q, k, v), options)
    lengths = draw.integers(1, keys, 2, 3)[:, 1]
    options = {
        **sinks,
        "sinks": draw.normal(4, 2)[:, 1],
        "q_offset": draw.integers(0, keys, 4)[::2],
    }
    alibi = {"alibi_slopes": draw.normal(4, 2)[:, 0].abs() / 8, "kv_lengths": lengths}
    yield Sample("strided_extras", (q, k, v), {**options, **alibi})
    alike: dict[str, Any] = {"kv_lengths": draw.integers(1, keys, 1).expand(2)}
    alike |= {"sinks": draw.normal(1).expand(4), "q_offset": draw.integers(0, keys, 1).expand(2)}
    yield Sample("expanded_extras", (q, k, v), {**sinks, **alike})


def cache_samples(draw: Draw) -> Iterator[Sample]:
    """Keys and values as a cache keeps them."""
    for heads, groups, rows, keys, width, value_width in (
        (9, 3, 1, draw.size(1, 700), 64, 64),
        (4, 2, 3, draw.size(3, 300), 40, 24),
        (4, 2, draw.size(30, 60), draw.size(60, 300), 32, 32),
    ):
        q, k, v = draw_qkv(draw, 2, heads, groups, rows, keys, width, value_width)
        name = f"{heads}x{groups}x{rows}x{keys}x{width}x{value_width}"
        options: dict[str, Any] = {"causal": True, "return_lse": True}
        halves = (q, k.bfloat16(), v.bfloat16())
        yield Sample(f"bf16_cache_{name}", halves, options, keep=(1, 2))
        (k, k_scale), (v, v_scale) = integers_of(draw, k), integers_of(draw, v)
        options = {**options, "k_scale": k_scale, "v_scale": v_scale}
        yield Sample(f"int8_cache_{name}", (q, k, v), options, keep=("k_scale", "v_scale"))
    options = {**options, "window": (40, 0), "sinks": draw.normal(heads), "softcap": 9.0}
    options |= {"mask": draw.normal(keys), "alibi_slopes": draw.normal(heads).abs() / 8}
    beyond = torch.arange(keys) >= keys - 7
    options |= {"kv_lengths": torch.tensor([keys - 7, keys - 7])}
    options |= {n: options[n].masked_fill(beyond, math.nan) for n in ("k_scale", "v_scale")}
    yield Sample("int8_cache_everything", (q, k, v), options, keep=("k_scale", "v_scale"))


def integers_of(draw: Draw, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x's rows in int8 and their scales; every other scale belongs to another buffer's rows."""
    integers, scale = quantize_rows(x)
    return integers, torch.stack((scale, draw.normal(*scale.shape)), -1)[..., 0]


def refuses_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra, options: Options
) -> list[str]:
    reasons = attention_native.refuses_widths(q, v)
    for name, tensor in (("mask", extra.mask), ("alibi_slopes", extra.alibi_slopes)):
        if contract.wants_gradient(tensor):
            reasons.append(f"{name} requires a gradient: these kernels have none for it")
    if k.dtype != q.dtype and attention_native.wants_any_gradient(q, k, v, extra):
        reasons.append(f"an input requires a gradient: with keys in {k.dtype} there is none")
    return reasons


OP = Op(
    "attention",
    reference,
    check,
    samples,
    (
        attention_native.cuda(),
        triton_candidate("attention", refuses_triton, into=False),
        *attention_native.candidates(),
    ),
    arguments=arguments,
    shapes=gpu_table.attention_class,
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    q_offset: torch.Tensor | int | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Result:
    """softmax(scale * q k^T) v over the keys that each query may attend to, in float32.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D), H a multiple of G: head h uses the key/value head h // (H / G).
        v: (B, G, S, Dv).
        mask: broadcastable to (B, H, T, S); bool (True = may attend), or float (added).
        causal: a query at position p attends to keys j <= p.
        window: (left, right): to keys p - left <= j <= p + right; None is unbounded.
        scale: of the scores; 1 / sqrt(D) unless given.
        softcap: scores become softcap * tanh(score / softcap), before masks.
        kv_lengths: (B) int, the valid keys of each sequence; what lies past them is never used.
        q_offset: int or (B) int, the position of query 0; kv_length - T unless given.
        sinks: (H), a logit for each head that only adds to the softmax's sum.
        alibi_slopes: (H) or (B, H); slope * |p - j| is taken from the scores.
        dropout_p: probability with which a weight is dropped, in [0, 1); kept ones are scaled.
        return_lse: also return the log of each softmax's sum, (B, H, T), float32.
        k_scale, v_scale: (B, G, S), with k and v in int8: what each row is to be multiplied by.

    Returns (B, H, T, Dv) in q's dtype, or that and the lse. A query that may attend to nothing
    gives 0, and its gradient is 0.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        kv_lengths=kv_lengths,
        q_offset=q_offset,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=return_lse,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    kernel = OP.kernel(call_key(*args), *args)
    if kernel.backward is not None and contract.wants_gradient(q, k, v, sinks, mask, alibi_slopes):
        return attention_native.record(kernel, *args)
    return kernel.forward(*args)
