"""One random call of an op after another: shapes, layouts, options, drawn from one seed each.

The contracts' samples (llmcore/ops/<op>.py) are chosen cases at random sizes; these combine
everything with everything. An op without a generator here takes its contract's samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from llmcore.dispatch import REGISTRY
from llmcore.ops.cross_entropy import REDUCTIONS
from llmcore.ops.packed_weight import FORMATS, GROUPS, pack
from llmcore.ops.quantize_rows import quantize_rows
from llmcore.ops.sample import Draw, Sample

EDGES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
"""Sizes beside those of vectors and blocks."""


def yes(draw: Draw, p: float = 0.5) -> bool:
    return bool(draw.chance(p, 1))


def pick(draw: Draw, *choices: Any) -> Any:
    return choices[draw.size(0, len(choices) - 1)]


def size(draw: Draw, most: int) -> int:
    """From 1 to `most`, often an edge; rarely 0."""
    if yes(draw, 0.02):
        return 0
    edges = [edge for edge in EDGES if edge <= most]
    return pick(draw, *edges) if yes(draw, 0.4) else draw.size(1, most)


def values(draw: Draw, *shape: int, scale: float | None = None) -> torch.Tensor:
    """Normal values of some scale, in a layout: contiguous, transposed, or a part of a larger one.

    A part begins at any element, so that its address is a multiple of the element's size alone.
    """
    scale = pick(draw, 1.0, 1.0, 0.1, 4.0) if scale is None else scale
    layout = pick(draw, "contiguous", "contiguous", "transposed", "part")
    if layout == "transposed" and len(shape) >= 2:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return draw.normal(*swapped).transpose(-1, -2) * scale
    if layout == "part":
        ahead, behind = draw.size(0, 3), draw.size(0, 3)
        whole = draw.normal(*shape[:-1], shape[-1] + ahead + behind) * scale
        return whole[..., ahead : ahead + shape[-1]]
    return draw.normal(*shape) * scale


def rows(draw: Draw, width: int) -> tuple[int, ...]:
    """The shape of rows of one width along one, two or three axes."""
    return pick(draw, (size(draw, 40), width), (width,), (draw.size(1, 4), size(draw, 12), width))


def sometimes(draw: Draw, value: Any, p: float = 0.5) -> Any:
    return value if yes(draw, p) else None


def kept(draw: Draw, args: tuple[Any, ...], *names: int) -> tuple[int | str, ...]:
    """Parameters that stay float32, as layers keep them."""
    return tuple(n for n in names if args[n] is not None) if yes(draw, 0.3) else ()


def norm_parameters(draw: Draw, width: int, count: int) -> tuple[torch.Tensor | None, ...]:
    return tuple(sometimes(draw, draw.normal(width), 0.8) for _ in range(count))


def norm(parameters: int, with_residual: bool) -> Callable[[Draw], Sample]:
    def make(draw: Draw) -> Sample:
        width = size(draw, 700)
        shape = rows(draw, width)
        inputs = [values(draw, *shape) for _ in range(2 if with_residual else 1)]
        args = (*inputs, *norm_parameters(draw, width, parameters), pick(draw, 1e-5, 1e-6, 1e-2))
        places = range(len(inputs), len(inputs) + parameters)
        return Sample("norm", args, keep=kept(draw, args, *places))

    return make


def softmax(draw: Draw) -> Sample:
    x = values(draw, *rows(draw, size(draw, 700)))
    return Sample("softmax", (x, draw.size(-x.ndim, x.ndim - 1)))


def mask_for(draw: Draw, *shape: int) -> torch.Tensor | None:
    """None, or a mask of booleans or numbers over all of these axes or some."""
    kind = pick(draw, "none", "bool", "float")
    if kind == "none":
        return None
    axes = tuple(1 if yes(draw, 0.3) else n for n in shape)
    axes = axes[draw.size(0, len(axes) - 1) :]
    if kind == "bool":
        return draw.chance(0.7, *axes)
    return draw.normal(*axes).masked_fill(draw.chance(0.1, *axes), -math.inf)


def masked_softmax(draw: Draw) -> Sample:
    shape = (draw.size(1, 3), size(draw, 40), size(draw, 300))
    scale = pick(draw, 1.0, 0.125, 0.31)
    options = {"mask": mask_for(draw, *shape), "causal": yes(draw), "scale": scale}
    return Sample("masked_softmax", (values(draw, *shape),), options)


def loss_options(draw: Draw, classes: int) -> dict[str, Any]:
    return {
        "reduction": pick(draw, *REDUCTIONS),
        "label_smoothing": pick(draw, 0.0, 0.1, 0.3),
        "ignore_index": pick(draw, -100, draw.size(0, classes - 1)),
    }


def targets(draw: Draw, count: int, classes: int, options: dict[str, Any]) -> torch.Tensor:
    """Some of them ignored, and one that is not (a mean over nothing is NaN)."""
    found = draw.integers(0, classes, count)
    found[draw.chance(0.2, count)] = options["ignore_index"]
    if count and classes > 1:
        found[0] = (options["ignore_index"] + 1) % classes
    return found


def cross_entropy(draw: Draw) -> Sample:
    count, classes = size(draw, 30), draw.size(2, 900)
    options = loss_options(draw, classes)
    logits = values(draw, count, classes)
    return Sample("cross_entropy", (logits, targets(draw, count, classes, options)), options)


def linear_cross_entropy(draw: Draw) -> Sample:
    count, width, classes = size(draw, 40), size(draw, 70), draw.size(2, 500)
    options = loss_options(draw, classes)
    tensors = values(draw, count, width), values(draw, classes, width)
    bias = sometimes(draw, draw.normal(classes))
    args = (*tensors, targets(draw, count, classes, options), bias)
    return Sample("linear_cross_entropy", args, options, keep=kept(draw, args, 3))


def rope(draw: Draw) -> Sample:
    batch, heads, length, width = draw.size(1, 3), draw.size(1, 4), size(draw, 30), size(draw, 80)
    half = draw.size(0, width // 2)
    table = (batch, length, half) if yes(draw) else (length, half)
    angle = draw.normal(*table)
    args = (values(draw, batch, heads, length, width), angle.cos(), angle.sin())
    return Sample("rope", args, {"interleaved": yes(draw)}, keep=kept(draw, args, 1, 2))


def gelu(draw: Draw) -> Sample:
    return Sample("gelu", (values(draw, *rows(draw, size(draw, 300))), pick(draw, "none", "tanh")))


def gated(*more: str) -> Callable[[Draw], Sample]:
    def make(draw: Draw) -> Sample:
        shape = rows(draw, size(draw, 300))
        approximate = (pick(draw, *more),) if more else ()
        if yes(draw, 0.3):  # the two halves of one projection
            both = draw.normal(*shape[:-1], 2 * shape[-1])
            return Sample("halves", (*both.chunk(2, -1), *approximate))
        return Sample("gated", (values(draw, *shape), values(draw, *shape), *approximate))

    return make


def linear(draw: Draw) -> Sample:
    height, format = size(draw, 130), pick(draw, "", "", *FORMATS)
    bias = sometimes(draw, draw.normal(height))
    if format:
        group = pick(draw, *GROUPS[:4])
        width = group * draw.size(1, 256 // group)
        weight = pack(draw.normal(height, width), format, group)
    else:
        width = size(draw, 260)
        weight = values(draw, height, width)
    args = (values(draw, *rows(draw, width)), weight, bias)
    return Sample(f"linear {format}", args, keep=kept(draw, args, 2))


def attention_options(draw: Draw, sizes: tuple[int, ...]) -> dict[str, Any]:
    batch, heads, length, keys = sizes
    found: dict[str, Any] = {"causal": yes(draw), "return_lse": yes(draw)}

    def maybe(name: str, make: Callable[[], Any], p: float = 0.25) -> None:
        if yes(draw, p):
            found[name] = make()

    def side() -> int | None:
        return sometimes(draw, draw.size(0, max(keys, 1)))

    maybe("window", lambda: (side(), side()))
    maybe("scale", lambda: pick(draw, 0.02, 0.1))
    maybe("softcap", lambda: pick(draw, 3.0, 20.0))
    maybe("kv_lengths", lambda: draw.integers(0, keys + 1, batch))
    maybe("q_offset", lambda: pick(draw, draw.size(0, keys), draw.integers(0, keys + 1, batch)))
    maybe("sinks", lambda: draw.normal(heads))
    maybe("alibi_slopes", lambda: draw.normal(*pick(draw, (heads,), (batch, heads))).abs() / 8)
    maybe("mask", lambda: mask_for(draw, batch, heads, length, keys))
    maybe("dropout_p", lambda: pick(draw, 0.1, 0.5), 0.15)
    return found


def attention(draw: Draw) -> Sample:
    groups, share, batch = draw.size(1, 3), pick(draw, 1, 1, 2, 3), draw.size(1, 2)
    length, keys = size(draw, pick(draw, 1, 4, 70)), size(draw, 140)
    width = pick(draw, 8, 16, 40, 64, 64, 72, 96, 128, draw.size(1, 80))
    value_width = pick(draw, width, width, size(draw, 70))
    # Scores up to about 10: exp magnifies the rounding of larger ones, in the definition as well,
    # and a backward pass that subtracts an lse of their size from them rounds once more.
    tensors = (
        values(draw, batch, groups * share, length, width, scale=1.0),
        values(draw, batch, groups, keys, width, scale=pick(draw, 0.1, 1.0, 1.5)),
        values(draw, batch, groups, keys, value_width),
    )
    options = attention_options(draw, (batch, groups * share, length, keys))
    small = ("sinks", "alibi_slopes", "mask")
    keep = tuple(name for name in small if options.get(name) is not None and yes(draw, 0.3))
    sample = Sample("attention", tensors, options, keep)
    return cached(draw, sample) if yes(draw, 0.3) else sample


def cached(draw: Draw, sample: Sample) -> Sample:
    """The same with keys and values as a cache keeps them."""
    q, k, v = sample.args
    if yes(draw):
        return Sample("bf16 cache", (q, k.bfloat16(), v.bfloat16()), sample.options, (1, 2))
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return Sample("int8 cache", (q, k, v), sample.options | scales, tuple(scales))


GENERATORS: dict[str, Callable[[Draw], Sample]] = {
    "layer_norm": norm(2, with_residual=False),
    "rms_norm": norm(1, with_residual=False),
    "add_layer_norm": norm(2, with_residual=True),
    "add_rms_norm": norm(1, with_residual=True),
    "softmax": softmax,
    "masked_softmax": masked_softmax,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rope": rope,
    "gelu": gelu,
    "swiglu": gated(),
    "geglu": gated("none", "tanh"),
    "linear": linear,
    "attention": attention,
}


def random_sample(op: str, seed: int) -> Sample:
    """The call of an op that a seed stands for."""
    draw = Draw(seed)
    generator = GENERATORS.get(op)
    found = generator(draw) if generator else pick(draw, *REGISTRY[op].samples(draw))
    return Sample(f"seed {seed}, {found.name}", found.args, found.options, found.keep)
