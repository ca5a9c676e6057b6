"""PTX scalar types: how raw register bits become NumPy values and back.

Registers hold raw unsigned bits (``uint8/16/32/64``, or ``bool`` for predicates). A ``PtxType``
decodes them to the dtype that the arithmetic uses and encodes results again. Packed types (f16x2,
bf16x2) decode to shape ``(lanes, 2)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
RAW = {
    1: np.dtype(bool),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}


@dataclass(frozen=True)
class PtxType:
    """A PTX type; ``kind`` is one of u, s, b, f, p (predicate)."""

    name: str
    bits: int
    kind: str
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    count: int = 1

    @property
    def raw(self) -> np.dtype:
        """Dtype of the register bits."""
        return RAW[self.bits]

    @property
    def nbytes(self) -> int:
        return max(self.bits // 8, 1)

    @property
    def is_float(self) -> bool:
        return self.kind == "f"


def round_to_bf16(value: Array) -> Array:
    """Round float32 to bfloat16 bits (nearest even, NaN kept quiet)."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def bf16_to_f32(raw: Array) -> Array:
    """Widen bfloat16 bits to float32."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_tf32(value: Array) -> Array:
    """Round float32 to tf32 (nearest, ties away), returned as float32 with 13 zero bits."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(
        np.float32
    )


def _integer(name: str, bits: int, kind: str) -> PtxType:
    dtype = np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
    raw = RAW[bits]
    return PtxType(
        name,
        bits,
        kind,
        lambda a: a.view(dtype),
        lambda v: (v if v.dtype == dtype else v.astype(dtype)).view(raw),
    )


def _native_float(name: str, bits: int) -> PtxType:
    dtype, raw = np.dtype(f"f{bits // 8}"), RAW[bits]
    return PtxType(
        name,
        bits,
        "f",
        lambda a: a.view(dtype),
        lambda v: (v if v.dtype == dtype else v.astype(dtype)).view(raw),
    )


def _pairs(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 2)


def _join(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def _f16(a: Array) -> Array:
    return a.view(np.float16).astype(np.float32)


def _to_f16(v: Array) -> Array:
    return v.astype(np.float16).view(np.uint16)


def _unsupported(_: Array) -> Array:
    raise NotImplementedError


TYPES: dict[str, PtxType] = {
    t.name: t
    for t in [
        *(_integer(f"{k}{b}", b, k) for k in "usb" for b in (8, 16, 32, 64)),
        _native_float("f32", 32),
        _native_float("f64", 64),
        PtxType(
            "tf32",
            32,
            "f",
            lambda a: (a & np.uint32(0xFFFFE000)).view(np.float32),
            lambda v: round_to_tf32(v).view(np.uint32),
        ),
        PtxType("f16", 16, "f", _f16, _to_f16),
        PtxType("bf16", 16, "f", bf16_to_f32, round_to_bf16),
        PtxType("f16x2", 32, "f", lambda a: _f16(_pairs(a)), lambda v: _join(_to_f16(v)), 2),
        PtxType(
            "bf16x2",
            32,
            "f",
            lambda a: bf16_to_f32(_pairs(a)),
            lambda v: _join(round_to_bf16(v)),
            2,
        ),
        PtxType("pred", 1, "p", lambda a: a, lambda v: v),
    ]
}


def bit_type(bits: int) -> PtxType:
    """The untyped (b) type of a width."""
    return TYPES["pred"] if bits == 1 else TYPES[f"b{bits}"]
