"""Kernels that are wrong in one way each, which the yardstick must refuse.

Each has the signature of its op's contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from llmcore.dispatch import REGISTRY
from llmcore.ops import contract
from llmcore.ops.attention_definition import Extra, Options
from llmcore.ops.cross_entropy import LossOptions

Kernel = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def define(name: str, *args: Any) -> Any:
    return REGISTRY[name].reference(*args)


def rms_norm_eps_forgotten(x: Any, weight: Any, eps: float) -> Any:
    return define("rms_norm", x, weight, 0.0)


def rms_norm_eps_outside_the_root(x: Any, weight: Any, eps: float) -> Any:
    wide = x.float() if x.dtype != torch.float64 else x
    y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rms_norm_last_block_dropped(x: Any, weight: Any, eps: float) -> Any:
    """The sum of squares leaves out what does not fill a block of 16."""
    wide = x.float()
    whole = x.shape[-1] // 16 * 16 or x.shape[-1]
    mean = wide[..., :whole].square().sum(-1, keepdim=True) / x.shape[-1]
    y = wide * torch.rsqrt(mean + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def layer_norm_variance_over_one_less(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    wide = x.float()
    rstd = torch.rsqrt(wide.var(-1, keepdim=True) + eps)
    y = (wide - wide.mean(-1, keepdim=True)) * rstd
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def layer_norm_one_pass_variance(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """E[x^2] - E[x]^2 in float32 cancels where the offset is large."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = wide.square().mean(-1, keepdim=True) - mean.square()
    y = (wide - mean) * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def softmax_without_the_maximum(x: Any, dim: int) -> Any:
    e = contract.widen(x).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


def softmax_over_the_last_axis_always(x: Any, dim: int) -> Any:
    return define("softmax", x, x.ndim - 1)


def masked_softmax_causal_off_by_one(x: Any, mask: Any, causal: bool, scale: float) -> Any:
    if causal:
        rows, keys = x.shape[-2:]
        seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows + 1)
        mask = seen if mask is None else mask & seen
    return define("masked_softmax", x, mask, False, scale)


def rope_turned_backwards(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    return define("rope", x, cos, -sin, interleaved)


def rope_pairs_of_the_other_layout(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    return define("rope", x, cos, sin, not interleaved)


def gelu_always_tanh(x: Any, approximate: str) -> Any:
    return define("gelu", x, "tanh")


def swiglu_halves_swapped(gate: Any, up: Any) -> Any:
    return define("swiglu", up, gate)


def linear_sum_in_the_half_type(x: Any, weight: Any, bias: Any) -> Any:
    """Adds products up in x's dtype: what "accumulate in float32" forbids."""
    total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    for column, row in zip(x.unbind(-1), weight.unbind(-1), strict=True):
        total = total + column[..., None] * row
    return total


def linear_last_output_block_without_bias(x: Any, weight: Any, bias: Any) -> Any:
    if bias is not None:
        whole = bias.shape[0] // 8 * 8
        bias = torch.cat((bias[:whole], torch.zeros_like(bias[whole:])))
    return define("linear", x, weight, bias)


def cross_entropy_mean_over_ignored_too(logits: Any, target: Any, options: LossOptions) -> Any:
    loss = define("cross_entropy", logits, target, options._replace(reduction="none"))
    return (
        define("cross_entropy", logits, target, options)
        if options.reduction != "mean"
        else (loss.float().sum() / max(target.numel(), 1)).to(logits.dtype)
    )


def cross_entropy_smoothing_forgotten(logits: Any, target: Any, options: LossOptions) -> Any:
    return define("cross_entropy", logits, target, options._replace(label_smoothing=0.0))


def change(fault: str, **numbers: Callable[[Any], Any]) -> Kernel:
    """attention with some options changed, each by a function of its value."""

    def kernel(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
        new = {name: f(getattr(options, name)) for name, f in numbers.items()}
        return define("attention", q, k, v, extra, options._replace(**new))

    kernel.__name__ = f"attention_{fault}"
    return kernel


attention_softcap_forgotten = change("softcap_forgotten", softcap=lambda cap: None)
attention_window_off_by_one = change("window_off_by_one", window=lambda w: (w[0] + 1, w[1]))


def attention_scale_of_a_padded_head(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """The scale of D rounded up to a multiple of 8."""
    padded = -(-q.shape[3] // 8) * 8
    return define("attention", q, k, v, extra, options._replace(scale=padded**-0.5))


def attention_dropout_scaled_wrong(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """By 1 / p in place of 1 / (1 - p)."""
    y = define("attention", q, k, v, extra, options)
    factor = (1 - options.dropout_p) / options.dropout_p
    return (y[0] * factor, y[1]) if options.return_lse else y * factor


def attention_causal_off_by_one(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    if options.causal and extra.kv_lengths is None and not isinstance(extra.q_offset, torch.Tensor):
        end = k.shape[2] - q.shape[2]
        extra = extra._replace(q_offset=1 + (end if extra.q_offset is None else extra.q_offset))
    return define("attention", q, k, v, extra, options)


def attention_causal_aligned_at_the_start(
    q: Any, k: Any, v: Any, extra: Extra, options: Options
) -> Any:
    return define("attention", q, k, v, extra._replace(q_offset=0), options)


def attention_last_key_block_dropped(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    whole = k.shape[2] // 64 * 64
    if extra.mask is None and extra.kv_lengths is None and whole:
        k, v = k[:, :, :whole], v[:, :, :whole]
    return define("attention", q, k, v, extra, options)


def attention_tail_of_the_cache_read(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """0 * NaN: the weights past kv_lengths are 0, and the values are multiplied all the same."""
    y = define("attention", q, k, v, extra, options)
    if extra.kv_lengths is None:
        return y
    poison = (v * 0).sum((1, 2), keepdim=True).to(q.dtype)
    return (y[0] + poison, y[1]) if options.return_lse else y + poison


def attention_sink_forgotten(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    return define("attention", q, k, v, extra._replace(sinks=None), options)


def attention_alibi_without_offset(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    if extra.alibi_slopes is not None and not options.causal:
        extra = extra._replace(q_offset=0)
    return define("attention", q, k, v, extra, options)


def attention_lse_in_base_2(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    y = define("attention", q, k, v, extra, options)
    return (y[0], y[1] / math.log(2)) if options.return_lse else y


def attention_heads_interleaved(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """Head h uses the key/value head h % G in place of h // (H / G)."""
    share = q.shape[1] // k.shape[1]
    return define(
        "attention", q, k.repeat(1, share, 1, 1), v.repeat(1, share, 1, 1), extra, options
    )


def attention_other_seed(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    if extra.seed is not None:
        extra = extra._replace(seed=extra.seed + 1)
    return define("attention", q, k, v, extra, options)


def attention_values_summed_in_half(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """The output is kept in the half type from one key to the next."""
    weights = (q.float() @ k.float().mT * options.scale).softmax(-1)  # a constant mask changes none
    total = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for key in range(k.shape[2]):
        total = (total.float() + weights[..., key, None] * v[:, :, key, None].float()).to(q.dtype)
    return total


def gradient_times(factor: float, name: str) -> Kernel:
    """The right result with its gradient scaled."""

    def kernel(*args: Any) -> Any:
        y = define(name, *args)
        first, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        scaled = ScaledGradient.apply(first, factor)
        return scaled if rest is None else (scaled, *rest)

    return kernel


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy * ctx.factor, None


ALL, HALF, FLOAT32 = DTYPES, DTYPES[1:], DTYPES[:1]
FAULTS: list[tuple[str, Kernel, str, tuple[torch.dtype, ...]]] = [
    # op, fault, the sample that shows it, in these dtypes
    ("rms_norm", rms_norm_eps_forgotten, "tiny_values", ALL),
    ("rms_norm", rms_norm_eps_outside_the_root, "tiny_values", ALL),
    ("rms_norm", rms_norm_last_block_dropped, "4x19", ALL),
    ("layer_norm", layer_norm_variance_over_one_less, "9x7", ALL),
    ("layer_norm", layer_norm_one_pass_variance, "large_offset", FLOAT32),
    ("softmax", softmax_without_the_maximum, "large_offset", ALL),
    ("softmax", softmax_over_the_last_axis_always, "axis_0", ALL),
    ("masked_softmax", masked_softmax_causal_off_by_one, "causal_square", ALL),
    ("rope", rope_turned_backwards, "half_split_part", ALL),
    ("rope", rope_pairs_of_the_other_layout, "interleaved_full", ALL),
    ("gelu", gelu_always_tanh, "nonex2x3x341", FLOAT32),  # half types can't tell them apart
    ("swiglu", swiglu_halves_swapped, "2x3x341", ALL),
    ("linear", linear_sum_in_the_half_type, "long_sum", HALF),
    ("linear", linear_last_output_block_without_bias, "5x7x1", ALL),
    ("cross_entropy", cross_entropy_mean_over_ignored_too, "mean_ignored_nan", ALL),
    ("cross_entropy", cross_entropy_smoothing_forgotten, "sum_smooth", ALL),
    ("attention", attention_scale_of_a_padded_head, "1x1x1x7x9x5x3", ALL),
    ("attention", attention_softcap_forgotten, "softcap", ALL),
    ("attention", attention_dropout_scaled_wrong, "dropout_0.7", ALL),
    ("attention", attention_window_off_by_one, "window_5_0", ALL),
    ("attention", attention_causal_off_by_one, "1x2x2x33x65x24x40_causal", ALL),
    ("attention", attention_causal_aligned_at_the_start, "1x2x1x17x130x80x80_causal", ALL),
    ("attention", attention_last_key_block_dropped, "1x2x2x33x65x24x40", ALL),
    ("attention", attention_tail_of_the_cache_read, "lengths_nan_tail", ALL),
    ("attention", attention_sink_forgotten, "sinks", ALL),
    ("attention", attention_alibi_without_offset, "alibi_by_sequence", ALL),
    ("attention", attention_lse_in_base_2, "lengths_causal", ALL),
    ("attention", attention_heads_interleaved, "everything", ALL),
    ("attention", attention_other_seed, "dropout_0.1", ALL),
    ("attention", attention_values_summed_in_half, "long_sum", HALF),
]
