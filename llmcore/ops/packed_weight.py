"""PackedWeight: the weight of a linear in another format, packed once for inference.

Formats, w the given weight (N, K), per group of `group` neighbours along K:
    fp32  w in float32
    bf16  w in bfloat16, nearest even
    int8  q = round(w / scale) in -127..127, scale = max|w| / 127
    int4  q = round(w / scale) in -8..7, scale = -w* / 8, w* the w of largest magnitude (so that w*
          becomes -8, and the step is max|w| / 8 and not / 7)
    int4, asymmetric: q = round((w - minimum) / scale) in 0..15, minimum = min w,
          scale = (max w - min w) / 15
It stands for scale * q, plus the minimum. Scales and minimums are rounded to float16 before q is
chosen; they are GGUF's Q8_0, Q4_0 and Q4_1, whose tensors fit without loss (`from_integers`).
float16 ends at 65504, and below 6e-5 it gets coarse: a scale is off by up to 3e-8.

In memory int8 and int4 lie as the kernels read them (csrc/ops.h, LinearQuantizedForward), the same
for every machine: in panels of 16 outputs, the last one padded with zeros. For each 4 neighbours
along K a panel has the 16 outputs' bytes side by side, q + 128 in int8; in int4 two such blocks
share their bytes, q (+ 8 when symmetric) of the first in the low half, of the second in the high.
Source: Frantar et al., GPTQ, 2022, section 3 (groups); llama.cpp's Q8_0, Q4_0 and Q4_1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch

from llmcore.ops import contract

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUPS = (16, 32, 64, 128, 256)
PANEL = 16
"""Outputs whose integers lie side by side."""

ZERO = {"int8": 128, "int4": 8}
"""What is added to q, so that it has no sign; nothing is where there are minimums."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) in one of FORMATS, made by `pack`; for inference, it takes no gradient.

    values: (N, K) float32 or bfloat16; (P, K / 4, 16, 4) uint8 for int8, (P, K / 8, 16, 4) for
    int4, P = ceil(N / 16).
    scales, minimums: (P, K / group, 16) float16, scales in int8 and int4, minimums in int4 where it
    is asymmetric.
    error: what the rounding lost, |packed - weight| / |weight| in the Euclidean norm.
    """

    format: str
    shape: torch.Size
    values: torch.Tensor
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    group: int = 0
    error: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(t.nbytes for t in (self.values, self.scales, self.minimums) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as it is, (N, K), computed in float32 or float64.

        Exact in either without minimums, and with them in float64.
        """
        if self.scales is None:
            return self.values.to(dtype)
        rows, width = self.shape
        quads = self.values.to(torch.int32)
        if self.format == "int4":
            quads = torch.stack((quads & 15, quads >> 4), 2).flatten(1, 2)
        outputs = self.values.shape[0] * PANEL
        groups = quads.transpose(1, 2).reshape(outputs, width // self.group, self.group)
        offset = 0 if self.minimums is not None else ZERO[self.format]
        weight = (groups - offset).to(dtype) * _of_outputs(self.scales).to(dtype)
        if self.minimums is not None:
            weight = weight + _of_outputs(self.minimums).to(dtype)
        return weight.flatten(1)[:rows]

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of it, indices (...) of integers -> (..., K) float32, exact as dequantize's."""
        if self.scales is None:
            return self.values[indices].float()
        panels, lanes = indices // PANEL, indices % PANEL

        def of_rows(panelled: torch.Tensor) -> torch.Tensor:
            return panelled[panels, :, lanes]

        quads = of_rows(self.values).to(torch.int32)
        if self.format == "int4":
            quads = torch.stack((quads & 15, quads >> 4), -2)
        offset = 0 if self.minimums is not None else ZERO[self.format]
        groups = (quads.flatten(indices.ndim) - offset).float().unflatten(-1, (-1, self.group))
        weight = groups * of_rows(self.scales).float()[..., None]
        if self.minimums is not None:
            weight = weight + of_rows(self.minimums).float()[..., None]
        return weight.flatten(-2)

    def to(self, device: torch.device | str, dtype: object = None) -> PackedWeight:
        """The same weight on another device; a dtype is passed over, the format says it."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            values=self.values.to(device),
            scales=move(self.scales),
            minimums=move(self.minimums),
        )

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
        format = self.format + (" asymmetric" if self.minimums is not None else "")
        group = f", group={self.group}" if self.group else ""
        rows, width = self.shape
        return (
            f"PackedWeight({format}{group}, ({rows}, {width}), {self.nbytes} bytes, "
            f"error {self.error:.2g})"
        )


def _no_gradient() -> NoReturn:
    raise RuntimeError(
        "weight: a PackedWeight is for inference and has no gradient; train the tensor it was "
        "packed from, or add trained weights beside it (LoRA)"
    )


def pack(
    weight: torch.Tensor, format: str, group: int = 32, *, asymmetric: bool = False
) -> PackedWeight:
    """The weight (N, K) of a linear in "fp32", "bf16", "int8" or "int4", for `llmcore.ops.linear`.

    `group` neighbours along K share a scale in the integer formats: 16, 32, 64, 128 or 256, a
    divisor of K. In int4 `asymmetric` gives each group a minimum besides. The result has memory of
    its own and no gradient; its `error` says what the rounding lost.

    Raises:
        TypeError: weight is no floating tensor.
        ValueError: another format, shape or group, asymmetric outside int4, or int8 or int4 of a
            weight that is not finite or whose scales float16 cannot hold.
    """
    contract.check_floating(weight=weight)
    contract.check_choice("format", format, FORMATS)
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (N, K)")
    if asymmetric and format != "int4":
        raise ValueError(f"asymmetric: got {asymmetric} with {format}, expected it with int4 only")
    weight = weight.detach()
    if format in ("fp32", "bf16"):
        dtype = torch.float32 if format == "fp32" else torch.bfloat16
        values = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return PackedWeight(format, weight.shape, values, error=_error(values, weight))
    contract.check_choice("group", group, GROUPS)
    if weight.shape[1] % group:
        raise ValueError(
            f"group: got {group}, expected a divisor of K, the last axis of weight, "
            f"which is {weight.shape[1]}"
        )
    groups = weight.float().unflatten(1, (-1, group))
    if not groups.isfinite().all():
        raise ValueError(f"weight: holds NaN or inf (or overflows float32), which {format} cannot")
    minimums = groups.amin(-1).half() if asymmetric else None
    scales = _scales(groups, format, asymmetric)
    if not all(t.isfinite().all() for t in (scales, minimums) if t is not None):
        raise ValueError("weight: too large, its scales overflow float16, which ends at 65504")
    step = scales.float()[..., None]
    offset = 0.0 if minimums is None else minimums.float()[..., None]
    low, high = (0, 15) if asymmetric else {"int8": (-127, 127), "int4": (-8, 7)}[format]
    q = ((groups - offset) / step.masked_fill(step == 0, torch.inf)).round().clamp(low, high)
    packed = from_integers(format, q.to(torch.int16).flatten(1), scales, minimums)
    return replace(packed, error=_error(q * step + offset, groups))


def _scales(groups: torch.Tensor, format: str, asymmetric: bool) -> torch.Tensor:
    """The scales (N, K / group) of pack in float16."""
    if asymmetric:
        return ((groups.amax(-1) - groups.amin(-1)) / 15).half()
    if format == "int8":
        return (groups.abs().amax(-1) / 127).half()
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return (peak / -8).half()


def _error(packed: torch.Tensor, weight: torch.Tensor) -> float:
    """|packed - weight| / |weight|; 0 where nothing was lost."""
    loss = torch.linalg.vector_norm(packed - weight, dtype=torch.float64).item()
    return loss and loss / torch.linalg.vector_norm(weight, dtype=torch.float64).item()


class Integers(NamedTuple):
    """A quantised matrix, the arguments of `from_integers`; rows stand for outputs in all three."""

    format: str
    q: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None


def from_integers(
    format: str,
    q: torch.Tensor,
    scales: torch.Tensor,
    minimums: torch.Tensor | None = None,
) -> PackedWeight:
    """The weight scale * q (+ minimum), without loss: of a tensor that is quantised already.

    q (N, K), whole, within -128..127 for "int8", -8..7 for "int4" and 0..15 with minimums; scales
    and minimums (N, K / group) float16.

    Raises:
        TypeError, ValueError: an argument doesn't fit, q is out of its range, or a scale or minimum
            is NaN or inf; the message names it.
    """
    group = _check_integers(format, q, scales, minimums)
    rows, width = q.shape
    unsigned = q if minimums is not None else q + ZERO[format]
    padded = _in_panels(unsigned.to(torch.uint8))
    blocks = padded.unflatten(1, (width // 4, 4)).transpose(2, 3)
    if format == "int4":
        blocks = blocks[:, ::2] | blocks[:, 1::2] << 4
    return PackedWeight(
        format,
        torch.Size((rows, width)),
        blocks.contiguous(),
        _in_panels(scales),
        None if minimums is None else _in_panels(minimums),
        group,
    )


def _check_integers(
    format: str, q: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None
) -> int:
    """The group of from_integers' arguments; TypeError or ValueError where they don't fit."""
    contract.check_choice("format", format, tuple(ZERO))
    if minimums is not None and format != "int4":
        raise ValueError(f"minimums: got them with {format}, expected them with int4 only")
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(f"q: got {q.dtype}, expected an integer dtype")
    if q.ndim != 2:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected (N, K)")
    rows, width = q.shape
    groups = scales.shape[1] if scales.ndim == 2 else 0
    group = width // groups if groups else GROUPS[0]
    if group not in GROUPS or scales.shape != (rows, groups) or group * groups != width:
        raise ValueError(
            f"scales: got shape {tuple(scales.shape)}, expected ({rows}, {width} / group) "
            f"with a group of {GROUPS}"
        )
    for name, tensor in (("scales", scales), ("minimums", minimums)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float16:
            raise TypeError(f"{name}: got {tensor.dtype}, expected torch.float16")
        if tensor.shape != scales.shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(scales.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: holds NaN or inf")
    low, high = {"int8": (-128, 127), "int4": (-8, 7)}[format] if minimums is None else (0, 15)
    if q.numel() and (q.amin() < low or q.amax() > high):
        raise ValueError(f"q: got values from {q.amin()} to {q.amax()}, expected {low} to {high}")
    return group


def _in_panels(columns: torch.Tensor) -> torch.Tensor:
    """(N, C) as (P, C, 16), the outputs of a panel side by side, zeros behind the last."""
    rows = columns.shape[0]
    padded = columns.new_zeros(-(-rows // PANEL) * PANEL, columns.shape[1])
    padded[:rows] = columns
    return padded.unflatten(0, (padded.shape[0] // PANEL, PANEL)).transpose(1, 2).contiguous()


def _of_outputs(panels: torch.Tensor) -> torch.Tensor:
    """(P, G, 16) as (P * 16, G, 1)."""
    return panels.transpose(1, 2).flatten(0, 1)[..., None]
