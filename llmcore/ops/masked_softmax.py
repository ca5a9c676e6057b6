"""masked_softmax: softmax over the last axis of x * scale, without the masked elements.

    s = x * scale + mask (float)    or    x * scale where mask (bool) is True
    y_ij = exp(s_ij - max_i) / sum_j exp(s_ij - max_i) over the j that row i may see, else 0

Tensors:
    x     (..., T, S)  scores; float32, bfloat16, float16 or float64, any strides
    mask  broadcastable to x's shape; bool (True = may see), float32 or x's dtype (added); or None
    y     (..., T, S)  x's dtype
causal: row i sees the elements j <= S - T + i (aligned at the end, as attention is).
Float32: everything up to y, which is rounded once.
Edge cases: a row that sees nothing, or only -inf, is 0 and so is its gradient; a masked NaN is
nothing; a NaN or +inf that a row sees makes the row NaN; S or T may be 0.
Errors: TypeError for a dtype, ValueError for a shape or a device; both name the argument.
Source: Vaswani et al., Attention Is All You Need, 2017, section 3.2.1.

Kernels: forward(x, mask, causal, scale) -> y; into the same with `out` behind, which may be x;
backward(dy, y, causal, scale) -> dx. They have no gradient for a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample


def reference(
    x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """The definition, in at least float32."""
    scores = contract.widen(x) * scale
    if causal:
        rows, keys = x.shape[-2:]
        row = torch.arange(rows, device=x.device)[:, None] + (keys - rows)
        key = torch.arange(keys, device=x.device)
        scores = scores.masked_fill(key > row, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        # Where the mask says -inf, whatever x holds there (a NaN) is nothing.
        scores = scores.masked_fill(mask == -math.inf, -math.inf) + mask
    return normalise(scores)[0].to(x.dtype)


def normalise(
    scores: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis in which a row of -inf gives zeros, and the log of its sum.

    `sinks`, broadcastable to scores' shape with a last axis of 1, are logits that only join the
    sum.
    """
    if scores.shape[-1] == 0:
        peak = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    else:
        peak = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach())
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    nothing = total == 0
    safe = total.masked_fill(nothing, 1.0)
    lse = (safe.log() + peak).masked_fill(nothing, -math.inf)
    return weights / safe, lse.squeeze(-1)


def check(x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x)
    contract.check_rows(x)
    if causal and x.ndim < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., T, S) with causal=True")
    contract.check_mask(mask, x.shape, x, "x")
    contract.check_number(-math.inf, math.inf, scale=scale)


def arguments(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """In the kernels' order."""
    return x, mask, causal, scale


def samples(draw: Draw) -> Iterator[Sample]:
    rows, keys = draw.size(1, 40), draw.size(1, 300)
    x = draw.normal(2, rows, keys)
    yield Sample("plain", (x,), {"scale": 0.3})
    yield Sample("causal", (x,), {"causal": True, "scale": 0.125})
    yield Sample("causal_square", (draw.normal(2, 3, 65, 65),), {"causal": True})
    yield Sample("more_rows_than_keys", (draw.normal(9, 5),), {"causal": True})
    seen = draw.chance(0.7, 2, rows, keys)
    seen[0, 0] = False
    yield Sample("bool_mask_empty_row", (x,), {"mask": seen, "causal": True})
    poisoned = x.masked_fill(~seen, math.nan)
    yield Sample("masked_nan", (poisoned,), {"mask": seen})
    added = draw.normal(1, rows, keys).masked_fill(draw.chance(0.2, 1, rows, keys), -math.inf)
    yield Sample("float_mask", (x,), {"mask": added, "scale": 0.5})
    yield Sample("float32_mask", (x,), {"mask": draw.normal(keys)}, keep=("mask",))
    yield Sample("strided", (draw.normal(33, 9).T,), {"causal": True})
    yield Sample("no_rows", (draw.normal(0, 7),), {"causal": True})
    yield Sample("no_keys", (draw.normal(3, 0),))
    yield Sample("one_axis", (draw.normal(17),), {"mask": draw.chance(0.5, 17)})


def refuses(x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float) -> list[str]:
    return native.refuses_tensors(x) + refuses_gradient(mask)


def refuses_triton(
    x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> list[str]:
    return contract.refuses_wide_rows(x) + refuses_gradient(mask)


def refuses_gradient(mask: torch.Tensor | None) -> list[str]:
    """Why a mask's gradient needs the definition."""
    if contract.wants_gradient(mask):
        return ["mask requires a gradient: these kernels have none for it"]
    return []


@native.fake("masked_softmax_forward")
def _(
    level: int, x: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("masked_softmax")


@native.fake("masked_softmax_backward")
def _(level: int, dy: torch.Tensor, y: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


OP = Op(
    "masked_softmax",
    reference,
    check,
    samples,
    (
        triton_candidate("masked_softmax", refuses_triton),
        *native_candidates("masked_softmax", refuses),
    ),
    arguments=arguments,
    cuda="no CUDA kernel yet",
)


class MaskedSoftmax(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        kernel: Candidate,
    ) -> torch.Tensor:
        return kernel.forward(x, mask, causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, mask, ctx.causal, ctx.scale, ctx.kernel = inputs
        ctx.save_for_backward(x, mask, output)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, mask, y = ctx.saved_tensors
        if contract.differentiated_again():
            again = contract.gradients(
                lambda t: reference(t, mask, ctx.causal, ctx.scale), (x,), dy
            )
            return *again, None, None, None, None
        return ctx.kernel.backward(dy, y, ctx.causal, ctx.scale), None, None, None, None


def masked_softmax(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(x * scale) over the last axis, without masked elements; a row that sees nothing is 0.

    x (..., T, S); mask broadcastable to it, bool (True = may see) or float (added after scale).
    causal: row i sees the elements j <= S - T + i. The result has x's shape and dtype. `out`,
    contiguous, takes it instead of a fresh tensor (it may be x itself); no gradient goes through
    it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    key = contract.call_key((x, mask), causal, scale, contract.wants_gradient(mask))
    kernel = OP.kernel(key, x, mask, causal, scale)
    if out is not None:
        contract.check_out(out, x.shape, x, x, mask)
        return contract.into(out, kernel, x, mask, causal, scale)
    if kernel.backward is not None and contract.wants_gradient(x):
        return MaskedSoftmax.record(x, mask, causal, scale, kernel)
    return kernel.forward(x, mask, causal, scale)
