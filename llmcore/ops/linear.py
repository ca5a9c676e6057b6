"""linear: y = x @ weight.T + bias, the weight a tensor or packed once for inference (PackedWeight).

Tensors:
    x       (..., K)  float32, bfloat16, float16 or float64, any strides
    weight  (N, K)    x's dtype, or a PackedWeight on x's device
    bias    (N)       x's dtype or float32; None stands for zeros
    y       (..., N)  x's dtype
Float32: x and the weight as they are, their products and sums, the bias; rounded once, into y.
A weight that is packed in a narrower form has x rounded too, as far as is needed for fast products.
bf16: x to bfloat16, to nearest, so that products are of pairs where the CPU has an instruction for
those. int8 and int4: so that products are those of integers; each row's groups of `group`
neighbours become q * step in float32, q whole in -127..127, by
    step = max|x| * (1 / 127)      q = round(x * (127 / max|x|)), ties to even
A group below 2^-100 counts as zeros. All of this is the same on every backend. The gradient of x is
that of the product with x as it was (straight through the rounding).
In torch.autocast x, weight and bias are cast to its dtype, as torch's linear does; a PackedWeight
stays as it is.
Edge cases: any of rows, K, N may be 0; NaN and inf as in torch, but with int8 or int4 a row of x
that holds either is NaN in all of y.
Errors: TypeError for a dtype, ValueError for a shape or a device; RuntimeError where a gradient to
a PackedWeight is asked. All name the argument.
Source: Dettmers et al., LLM.int8(), 2022, section 2 (absmax); llama.cpp's Q8_0 (of groups of 32).

Kernels: forward(x, weight, bias) -> y; into the same with `out` behind;
backward(dy, x, weight, *needs) -> dx, dweight, dbias (float32), each empty where not needed. The
native one sums in one order whatever the number of rows: a row's bits do not depend on the batch.
`torch` is torch's own product, for plain weights on a GPU, where it is the GPU library's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from llmcore import dispatch, native
from llmcore.dispatch import Candidate, Op, native_candidates, triton_candidate
from llmcore.ops import contract
from llmcore.ops.packed_weight import FORMATS, PackedWeight, pack
from llmcore.ops.sample import Draw, Sample

TRITON_ROWS = 64
"""Up to so many rows the Triton kernel of integer weights holds them in one tile."""

SMALLEST = 2.0**-100
"""A group of x below it counts as zeros: 127 over its largest magnitude must be finite."""


def rounded_to_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """x (float32 or float64), each of its groups rounded to 127 steps to either side of zero."""
    groups = x.detach().float().unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(peak, 127.0) / peak.masked_fill(peak < SMALLEST, math.inf)
    q = (groups * inverse).round()  # a NaN or inf in the group leaves a NaN, for inf * 0
    rounded = q.to(x.dtype) * (peak * (1 / 127)).to(x.dtype)
    return rounded.flatten(-2) + (x - x.detach())


def rounded_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x (float32 or float64) with bfloat16's 8 bits of mantissa."""
    rounded = x.detach().bfloat16().to(x.dtype)
    return rounded + (x - x.detach()).nan_to_num()  # which is 0, or NaN for an inf


def as_multiplied(x: torch.Tensor, weight: torch.Tensor | PackedWeight) -> torch.Tensor:
    """x (float32 or float64) as a product with this weight takes it."""
    if not isinstance(weight, PackedWeight) or weight.format == "fp32":
        return x
    return rounded_to_bfloat16(x) if weight.scales is None else rounded_to_int8(x, weight.group)


@contract.without_autocast
def reference(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, in at least float32."""
    wide = as_multiplied(contract.widen(x), weight)
    if isinstance(weight, PackedWeight):
        weight = weight.dequantize(wide.dtype)
    weight = weight.to(wide.dtype)
    return F.linear(wide, weight, None if bias is None else bias.to(wide.dtype)).to(x.dtype)


def check(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating({"bias": bias}, x=x)
    contract.check_rows(x)
    contract.check_dtype(x, "x", or_float32=True, bias=bias)
    if not isinstance(weight, PackedWeight):
        contract.check_floating(weight=weight)
        contract.check_dtype(x, "x", weight=weight)
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (N, {x.shape[-1]}), "
            "as the last axis of x"
        )
    if weight.device != x.device:
        raise ValueError(f"weight: on {weight.device}, expected {x.device}, where x is")
    contract.check_shape(weight.shape[:1], "the first axis of weight", bias=bias)


def arguments(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """As autocast wants them."""
    return contract.autocast(x, weight, bias)


def call_key(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
) -> Any:
    """What the check and the choice depend on."""
    if not isinstance(weight, PackedWeight):
        return contract.call_key((x, weight, bias))
    packed = (weight.format, weight.group, weight.shape, weight.device)
    return contract.call_key((x, bias), *packed)


def samples(draw: Draw) -> Iterator[Sample]:
    rows, width, height = draw.size(1, 40), draw.size(1, 200), draw.size(1, 200)
    for shape in ((rows, width, height), (1, 257, 65), (33, 64, 31), (5, 7, 1)):
        args = (draw.normal(*shape[:2]), draw.normal(shape[2], shape[1]), draw.normal(shape[2]))
        yield Sample("x".join(map(str, shape)), args)
    weight = draw.normal(48, 64)
    yield Sample("no_bias", (draw.normal(2, 3, 64), weight))
    yield Sample("one_axis", (draw.normal(64), weight, draw.normal(48)))
    yield Sample("strided", (draw.normal(64, 5).T, draw.normal(64, 9).T))
    yield Sample("float32_bias", (draw.normal(5, 64), weight, draw.normal(48)), keep=(2,))
    # A sum of one sign that a half type could not hold: its steps get larger than the terms.
    yield Sample("long_sum", (draw.normal(2, 1100).abs(), draw.normal(3, 1100).abs()))
    yield Sample("no_rows", (draw.normal(0, 64), weight))
    yield Sample("no_width", (draw.normal(3, 0), draw.normal(4, 0), draw.normal(4)))
    for format in FORMATS:
        packed = pack(draw.normal(57, 128), format, 32)
        yield Sample(f"{format}_rows", (draw.normal(7, 128), packed, draw.normal(57)))
        yield Sample(f"{format}_one_row", (draw.normal(1, 128), packed))
        yield Sample(f"{format}_no_rows", (draw.normal(0, 128), packed))
    packed = pack(draw.normal(9, 256), "int4", 128)
    yield Sample("int4_group_128", (draw.normal(2, 256), packed, draw.normal(9)), keep=(2,))
    packed = pack(draw.normal(33, 96) + 1.0, "int4", 16, asymmetric=True)
    yield Sample("int4_asymmetric", (draw.normal(11, 96), packed, draw.normal(33)))
    # All of one sign, at the ends of their range: where products would overflow int16.
    largest, ends = draw.normal(5, 64).sign(), draw.chance(0.9, 17, 64) * 2.0 - 1.0
    yield Sample("int8_ends", (largest, pack(ends, "int8", 64)))
    # A mean far from zero, where what unsigned weights have too much is most of the sum.
    yield Sample("int8_offset", (draw.normal(3, 64) + 30.0, pack(draw.normal(9, 64), "int8", 16)))
    # So many that a GPU's programs share them.
    packed = pack(draw.normal(20, 512), "int8", 32)
    yield Sample("int8_many_groups", (draw.normal(2, 512), packed, draw.normal(20)))


def refuses(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
) -> list[str]:
    values = weight if isinstance(weight, torch.Tensor) else None
    return native.refuses_tensors(x, values, bias)


@native.fake("linear_forward")
def _(
    level: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


native.fake_into("linear")


@native.fake("linear_backward")
def _(
    level: int,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return dx, dweight, x.new_empty(weight.shape[0] if need_dbias else 0, dtype=torch.float32)


@native.fake("linear_quantized_forward")
def _(
    level: int,
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


native.fake_into("linear_quantized")


def with_contract_arguments(plain: Candidate, quantized: Candidate) -> Candidate:
    """The raw candidates for floating and for integer weights as one with contract arguments."""
    product, product_into = plain.forward, plain.into
    quantized_into = quantized.into
    assert product_into is not None and quantized_into is not None

    def raw_arguments(
        x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
    ) -> tuple[bool, tuple[Any, ...]]:
        """Whether the weight holds integers, and the call as the raw op takes it."""
        if isinstance(weight, torch.Tensor):
            return False, (x, weight, bias)
        if weight.scales is None:
            return False, (x, weight.values, bias)
        return True, (x, weight.values, weight.scales, weight.minimums, bias, weight.shape[0])

    def forward(*args: Any) -> torch.Tensor:
        of_integers, raw = raw_arguments(*args)
        return quantized.forward(*raw) if of_integers else product(*raw)

    def into(*args: Any) -> None:
        of_integers, raw = raw_arguments(*args[:3])
        (quantized_into if of_integers else product_into)(*raw, args[3])

    return replace(plain, forward=forward, into=into)


def triton_refuses(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
) -> list[str]:
    if isinstance(weight, torch.Tensor):
        return ["a plain weight: its product is the GPU library's"]
    if weight.scales is None:
        return [f"a weight in {weight.format}: this kernel takes int8 and int4"]
    if (rows := math.prod(x.shape[:-1])) > TRITON_ROWS:
        return [f"{rows} rows: this kernel takes up to {TRITON_ROWS}, as in decoding"]
    return []


def torch_refuses(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
) -> list[str]:
    if isinstance(weight, PackedWeight):
        return ["a PackedWeight: torch has no product with it"]
    if not x.is_cuda and dispatch.forced != "torch":
        return ["a tensor on cpu: the native kernels are as fast, and keep a row's bits"]
    if bias is not None and bias.dtype != x.dtype:
        return [f"bias in {bias.dtype} beside {x.dtype}: torch takes one dtype"]
    return []


def torch_candidate() -> Candidate:
    """The GPU library's product."""

    def into(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        rows, y = as_rows(x), as_rows(out)
        if bias is None:
            torch.mm(rows, weight.T, out=y)
        else:
            torch.addmm(bias, rows, weight.T, out=y)

    def backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *needs: bool
    ) -> tuple[torch.Tensor, ...]:
        need_dx, need_dweight, need_dbias = needs
        return (
            dy @ weight if need_dx else x.new_empty(0),
            as_rows(dy).T @ as_rows(x) if need_dweight else weight.new_empty(0),
            as_rows(dy).sum(0, dtype=torch.float32) if need_dbias else x.new_empty(0),
        )

    return Candidate("torch", F.linear, backward, into, refuses=torch_refuses)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def candidates() -> tuple[Candidate, ...]:
    plain = native_candidates("linear", refuses)
    quantized = native_candidates("linear_quantized", refuses, backward=False)
    return (
        triton_candidate("linear", triton_refuses),
        torch_candidate(),
        *map(with_contract_arguments, plain, quantized),
    )


OP = Op(
    "linear",
    reference,
    check,
    samples,
    candidates(),
    arguments=arguments,
    cuda="no CUDA kernel: plain products are the GPU library's",
)


class Linear(contract.KernelFunction):
    """The gradient of a kernel's forward pass, by the same kernel's backward pass."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor | PackedWeight,
        bias: torch.Tensor | None,
        kernel: Candidate,
    ) -> torch.Tensor:
        return kernel.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, ctx.kernel = inputs
        ctx.packed = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(x, weight if ctx.packed is None else None, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        if contract.differentiated_again():

            def define(*tensors: Any) -> torch.Tensor:
                return reference(tensors[0], ctx.packed or tensors[1], tensors[2])

            return *contract.gradients(define, (x, weight, bias), dy), None
        if ctx.packed is not None:
            weight = ctx.packed.dequantize().to(dy.dtype)
        needs = ctx.needs_input_grad[:3]
        dx, dweight, dbias = ctx.kernel.backward(dy, x, weight, *needs)
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            None,
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, accumulated in float32.

    x (..., K); weight (N, K), a tensor of x's dtype or a PackedWeight (of any format, with any
    dtype of x; no gradient goes to it); bias (N), x's dtype or float32, or None. The result is
    (..., N) in x's dtype. `out`, contiguous, takes it instead of a fresh tensor; no gradient goes
    through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    args = arguments(x, weight, bias)
    kernel = OP.kernel(call_key(*args), *args)
    if out is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        contract.check_out(out, shape, args[0], x, *_tensors(weight), bias, in_place=False)
        return contract.into(out, kernel, *args)
    if kernel.backward is not None and contract.wants_gradient(x, *_tensors(weight), bias):
        return Linear.record(*args, kernel)
    return kernel.forward(*args)


def _tensors(weight: torch.Tensor | PackedWeight) -> tuple[torch.Tensor | None, ...]:
    if isinstance(weight, torch.Tensor):
        return (weight,)
    return weight.values, weight.scales, weight.minimums
