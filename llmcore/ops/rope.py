"""rope: rotates pairs of the first R elements of each head by the angles of their position.

    (y_a, y_b) = (x_a cos - x_b sin, x_b cos + x_a sin)   for the pair number r < R/2
    half-split   a = r,  b = r + R/2   (NeoX, Hugging Face)
    interleaved  a = 2r, b = 2r + 1    (the paper, GPT-J, llama's own)

Tensors:
    x         (B, H, T, D)              float32, bfloat16, float16 or float64, any strides
    cos, sin  (T, R/2) or (B, T, R/2)   x's dtype or float32; R <= D, the rest of D is copied
    y         (B, H, T, D)              x's dtype
Float32: the products and sums; rounded once, into y.
Edge cases: any of B, H, T, R may be 0; NaN and inf as in the formula.
Errors: TypeError for a dtype, ValueError for a shape or a device; both name the argument.
Source: Su et al., RoFormer, 2021, equation 34.

Kernels: forward(x, cos, sin, interleaved) -> y; into the same with `out` behind, which may be x;
backward(dy, cos, sin, interleaved) -> dx. The native ones have no gradient for cos and sin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmcore import native
from llmcore.dispatch import Candidate, Op, cuda_candidate, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample


def reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The definition, in at least float32."""
    half = cos.shape[-1]
    wide = contract.widen(x)
    turned, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
    else:
        a, b = turned[..., :half], turned[..., half:]
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]  # every head of a sequence turns alike
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x, cos=cos, sin=sin)
    contract.check_dtype(x, "x", or_float32=True, cos=cos, sin=sin)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, H, T, D)")
    batch, _, length, width = x.shape
    half = cos.shape[-1] if cos.ndim else 0
    if tuple(cos.shape) not in ((length, half), (batch, length, half)) or 2 * half > width:
        raise ValueError(
            f"cos: got shape {tuple(cos.shape)}, expected (T, R/2) or (B, T, R/2) with "
            f"T = {length}, B = {batch} and R <= {width}, as x has them"
        )
    contract.check_shape(cos.shape, "the shape of cos", sin=sin)


def arguments(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[Any, ...]:
    """In the kernels' order."""
    return x, cos, sin, interleaved


def angles(draw: Draw, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles."""
    angle = draw.normal(*shape) * 3
    return angle.cos(), angle.sin()


def samples(draw: Draw) -> Iterator[Sample]:
    batch, heads, length = draw.size(1, 3), draw.size(1, 5), draw.size(1, 40)
    for interleaved in (False, True):
        options = {"interleaved": interleaved}
        layout = "interleaved" if interleaved else "half_split"
        x = draw.normal(batch, heads, length, 64)
        yield Sample(f"{layout}_full", (x, *angles(draw, length, 32)), options)
        yield Sample(f"{layout}_part", (x, *angles(draw, length, 9)), options)
        yield Sample(f"{layout}_by_batch", (x, *angles(draw, batch, length, 32)), options)
        odd = draw.normal(2, 3, 5, 13)
        yield Sample(f"{layout}_odd", (odd, *angles(draw, 5, 6)), options)
        strided = draw.normal(2, 7, 3, 16).transpose(1, 2)
        yield Sample(f"{layout}_strided", (strided, *angles(draw, 7, 8)), options)
        table = (strided, *angles(draw, 2, 7, 8))
        yield Sample(f"{layout}_float32_angles", table, options, keep=(1, 2))
        yield Sample(f"{layout}_nothing", (x, *angles(draw, length, 0)), options)
        yield Sample(f"{layout}_empty", (draw.normal(2, 3, 0, 8), *angles(draw, 0, 4)), options)


@native.fake("rope_forward")
def _(
    level: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


native.fake_into("rope")


@native.fake("rope_backward")
def _(
    level: int, dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def refuses(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> list[str]:
    return native.refuses_tensors(x, cos, sin) + refuses_angles(x, cos, sin, interleaved)


def refuses_cuda(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> list[str]:
    return native.refuses_kinds(x, cos, sin) + refuses_angles(x, cos, sin, interleaved)


def refuses_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> list[str]:
    reasons = refuses_gradient(x, cos, sin, interleaved)
    if cos.dtype != sin.dtype:
        reasons.append(f"cos in {cos.dtype}, sin in {sin.dtype}: these kernels take one dtype")
    return reasons


def refuses_gradient(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> list[str]:
    """Why the angles' gradient needs the definition."""
    if contract.wants_gradient(cos, sin):
        return ["cos or sin requires a gradient: these kernels have that of x only"]
    return []


OP = Op(
    "rope",
    reference,
    check,
    samples,
    (
        cuda_candidate("rope", refuses_cuda),
        triton_candidate("rope", refuses_gradient),
        *native_candidates("rope", refuses),
    ),
    arguments=arguments,
)


class Rope(contract.KernelFunction):
    """The gradient of x: dy turned back."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        kernel: Candidate,
    ) -> torch.Tensor:
        return kernel.forward(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, cos, sin, ctx.interleaved, ctx.kernel = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        if (
            contract.differentiated_again()
        ):  # a rotation is linear: turning back has its own gradient
            return reference(dy, cos, -sin, ctx.interleaved), None, None, None, None
        return ctx.kernel.backward(dy, cos, sin, ctx.interleaved), None, None, None, None


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotary position embedding: turns pairs of the first R elements of every head, in float32.

    x (B, H, T, D); cos and sin (T, R/2) or (B, T, R/2), x's dtype or float32, R <= D. Pairs are
    (r, r + R/2), or (2r, 2r + 1) when interleaved. The result has x's shape and dtype. `out`,
    contiguous, takes it instead of a fresh tensor and may be x; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    key = contract.call_key((x, cos, sin), interleaved, contract.wants_gradient(cos, sin))
    kernel = OP.kernel(key, x, cos, sin, interleaved)
    if out is not None:
        contract.check_out(out, x.shape, x, x, cos, sin)
        return contract.into(out, kernel, x, cos, sin, interleaved)
    if kernel.backward is not None and contract.wants_gradient(x):
        return Rope.record(x, cos, sin, interleaved, kernel)
    return kernel.forward(x, cos, sin, interleaved)
