"""linear: y = x @ weight.T + bias, the weight a tensor or packed once for inference (PackedWeight).

Tensors:
    x       (..., K)  float32, bfloat16, float16 or float64, any strides
    weight  (N, K)    x's dtype, or a PackedWeight on x's device
    bias    (N)       x's dtype or float32; None stands for zeros
    y       (..., N)  x's dtype
Packed weights, w the given weight, per group of `group` neighbours along K:
    fp32  w in float32
    bf16  w in bfloat16, nearest even
    int8  q = round(w / scale) in -127..127, scale = max|w| / 127
    int4  q = round(w / scale) in -8..7, scale = -w* / 8, w* the w of largest magnitude (so that w*
          becomes -8, and the step is max|w| / 8 and not / 7); two to a byte, q + 8, the even k low
Scales are rounded to bfloat16 before q is chosen, so q * scale has at most 16 significant bits and
float32 holds it exactly: every order of unpacking gives the same weight.
Float32: x and the weight as they are, their products and sums, the bias; rounded once, into y.
int8 and int4 are formats of the weight alone: x is not quantised.
In torch.autocast x, weight and bias are cast to its dtype, as torch's linear does; a PackedWeight
stays as it is.
Edge cases: any of rows, K, N may be 0; NaN and inf as in torch; a group of zeros has scale 0.
Errors: TypeError for a dtype, ValueError for a shape, a device, a group or a weight to be quantised
that is not finite; RuntimeError where a gradient to a PackedWeight is asked. All name the argument.
Source: Frantar et al., GPTQ, 2022, section 3 (groups); llama.cpp's Q8_0 and Q4_0 (the two scales).

Kernels: forward(x, weight, bias) -> y; into the same with `out` behind;
backward(dy, x, weight, needs) -> dx, dweight, dbias (float32), each None where not needed. The
native one sums in one order whatever the number of rows: a row's bits do not depend on the batch.
Its gradients are products of the same kind, of transposed copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from llmcore import native
from llmcore.dispatch import Candidate, Op, native_candidates
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) in one of FORMATS, made by `pack`; for inference, it takes no gradient.

    values: (N, K) float32, bfloat16 or int8, or (N, K / 2) uint8 for int4.
    scales: (N, K / group) bfloat16 for int8 and int4, else None.
    """

    format: str
    shape: torch.Size
    values: torch.Tensor
    scales: torch.Tensor | None = None
    group: int = 0

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.values.nbytes + scales

    def dequantize(self) -> torch.Tensor:
        """The weight as it is, exactly, (N, K) float32."""
        values = self.values
        if self.format == "int4":
            values = torch.stack((values & 15, values >> 4), -1).flatten(-2).float() - 8
        values = values.float()
        if self.scales is None:
            return values
        return values * self.scales.float().repeat_interleave(self.group, -1)

    def to(self, device: torch.device | str, dtype: object = None) -> PackedWeight:
        """The same weight on another device; a dtype is passed over, the format says it."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, values=self.values.to(device), scales=scales)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Raises RuntimeError when a gradient is asked for."""
        if requires_grad:
            _no_gradient()
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def grad(self) -> NoReturn:
        _no_gradient()

    def __repr__(self) -> str:
        group = f", group={self.group}" if self.group else ""
        rows, width = self.shape
        return f"PackedWeight({self.format}{group}, ({rows}, {width}), {self.nbytes} bytes)"


def _no_gradient() -> NoReturn:
    raise RuntimeError(
        "weight: a PackedWeight is for inference and has no gradient; train the tensor it was "
        "packed from, or add trained weights beside it (LoRA)"
    )


def pack(weight: torch.Tensor, format: str, group: int = 32) -> PackedWeight:
    """The weight (N, K) of a linear in "fp32", "bf16", "int8" or "int4", for `llmcore.ops.linear`.

    `group` neighbours along K share a scale in the integer formats: 16, 32, 64, 128 or 256, a
    divisor of K. The result has memory of its own and no gradient.

    Raises:
        TypeError: weight is no floating tensor.
        ValueError: another format, shape or group, or int8 or int4 of a weight that is not finite.
    """
    contract.check_floating(weight=weight)
    contract.check_choice("format", format, FORMATS)
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (N, K)")
    weight = weight.detach()
    if format in ("fp32", "bf16"):
        dtype = torch.float32 if format == "fp32" else torch.bfloat16
        values = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return PackedWeight(format, weight.shape, values)
    contract.check_choice("group", group, GROUPS)
    if weight.shape[1] % group:
        raise ValueError(
            f"group: got {group}, expected a divisor of K, the last axis of weight, "
            f"which is {weight.shape[1]}"
        )
    groups = weight.float().unflatten(1, (-1, group))
    if not groups.isfinite().all():
        raise ValueError(f"weight: holds NaN or inf (or overflows float32), which {format} cannot")
    if format == "int8":
        scales, low, high = groups.abs().amax(-1) / 127, -127, 127
    else:
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales, low, high = peak / -8, -8, 7
    scales = scales.to(torch.bfloat16)
    step = scales.float()[..., None]
    q = (groups / step.masked_fill(step == 0, 1.0)).round().clamp(low, high).flatten(1)
    if format == "int8":
        return PackedWeight(format, weight.shape, q.to(torch.int8), scales, group)
    q = (q + 8).to(torch.uint8)
    return PackedWeight(format, weight.shape, q[:, ::2] | q[:, 1::2] << 4, scales, group)


@contract.without_autocast
def reference(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, in at least float32."""
    wide = contract.widen(x)
    if isinstance(weight, PackedWeight):
        weight = weight.dequantize()
    weight = weight.to(wide.dtype)
    return F.linear(wide, weight, None if bias is None else bias.to(wide.dtype)).to(x.dtype)


def check(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x, bias=bias)
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
    packed = pack(draw.normal(9, 256), "int4", 128)
    yield Sample("int4_group_128", (draw.normal(2, 256), packed, draw.normal(9)), keep=(2,))


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
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@native.fake("linear_forward_out")
def _(
    level: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    out: torch.Tensor,
) -> None:
    return None


def raw_arguments(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None
) -> tuple[Any, ...]:
    """A call as the raw ops take it."""
    if isinstance(weight, torch.Tensor):
        return x, weight, None, bias, 0
    return x, weight.values, weight.scales, bias, weight.group


def with_contract_arguments(candidate: Candidate) -> Candidate:
    """A raw candidate as one that takes the contract's arguments."""
    raw_forward, raw_into = candidate.forward, candidate.into
    assert raw_into is not None

    def forward(*args: Any) -> torch.Tensor:
        return raw_forward(*raw_arguments(*args))

    def into(*args: Any) -> None:
        raw_into(*raw_arguments(*args[:3]), args[3])

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return raw_forward(x, weight, None, None, 0)

    def backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        rows = dy.flatten(0, -2) if dy.ndim > 1 else dy[None]
        rows_of_x = x.flatten(0, -2) if x.ndim > 1 else x[None]
        dx = product(dy, weight.T) if needs[0] else None
        dweight = product(rows.T, rows_of_x.T) if needs[1] else None
        return dx, dweight, rows.sum(0, dtype=torch.float32) if needs[2] else None

    return replace(candidate, forward=forward, into=into, backward=backward)


def candidates() -> tuple[Candidate, ...]:
    found = native_candidates("linear", refuses, backward=False)
    return tuple(map(with_contract_arguments, found))


OP = Op(
    "linear",
    reference,
    check,
    samples,
    candidates(),
    arguments=arguments,
    triton="no Triton kernel yet",
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
        dx, dweight, dbias = ctx.kernel.backward(dy, x, weight, needs)
        return dx, dweight, None if dbias is None else dbias.to(bias.dtype), None


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


def _tensors(weight: torch.Tensor | PackedWeight) -> tuple[torch.Tensor, ...]:
    return (weight,) if isinstance(weight, torch.Tensor) else ()
