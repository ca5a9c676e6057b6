"""Arithmetic and logic: a table from opcode to lane-wise NumPy semantics.

``ALU[op](instr)`` returns an ``Alu``: the result type, the source types, and a function from
decoded sources to the (not yet encoded) result. To add an instruction, register one function
here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .dtypes import TYPES, Array, PtxType, round_to_tf32
from .errors import UnsupportedInstruction
from .parser import Imm, Instr

Value = Array | tuple[Array, ...]
PRED, B32, U32, S32, F32, F64 = (TYPES[n] for n in ("pred", "b32", "u32", "s32", "f32", "f64"))


@dataclass(frozen=True)
class Alu:
    """Semantics of one instruction. ``keep_raw`` skips decoding (bitwise moves)."""

    dest: PtxType
    sources: tuple[PtxType, ...]
    fn: Callable[..., Value]


Builder = Callable[[Instr], Alu]
ALU: dict[str, Builder] = {}


def alu(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for one or more opcodes."""

    def register(builder: Builder) -> Builder:
        ALU.update(dict.fromkeys(names, builder))
        return builder

    return register


def unsupported(instr: Instr) -> UnsupportedInstruction:
    """The error for an opcode variant that is not implemented."""
    return UnsupportedInstruction(f"unsupported instruction {instr.opcode!r}\n  {instr.where}")


# --- floating-point helpers ---------------------------------------------------------------------
def flush(value: Array) -> Array:
    """Flush float32 subnormals to zero, keeping the sign."""
    tiny = np.abs(value) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), value), value) if tiny.any() else value


def _post(instr: Instr, kind: PtxType, fn: Callable[..., Array]) -> Callable[..., Array]:
    """Apply .ftz, .sat and .relu around a floating-point function."""
    ftz = "ftz" in instr.mods and kind.name == "f32"
    sat, relu = "sat" in instr.mods, "relu" in instr.mods
    if not (kind.is_float and (ftz or sat or relu)):
        return fn

    def wrapped(*args: Array) -> Array:
        if ftz:
            args = tuple(flush(a) if a.dtype == np.float32 else a for a in args)
        result = fn(*args)
        if ftz:
            result = flush(result.astype(np.float32))
        if sat:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)
        return np.maximum(result, result.dtype.type(0)) if relu else result

    return wrapped


def directed(total: Array, error: Array | float, mode: str) -> Array:
    """Round ``total + error`` (float64, error below one ulp) to float32 toward rz, rm or rp."""
    nearest = total.astype(np.float32)
    gap = nearest.astype(np.float64) - total
    above = (gap > 0) | ((gap == 0) & (error < 0))  # the rounded value lies above the true one
    below = (gap < 0) | ((gap == 0) & (error > 0))
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if mode == "rm":
        return np.where(above, np.nextafter(nearest, down), nearest)
    if mode == "rp":
        return np.where(below, np.nextafter(nearest, up), nearest)
    inward = np.where(nearest > 0, above, below)
    return np.where(inward, np.nextafter(nearest, np.float32(0)), nearest)


def _mode(instr: Instr) -> str | None:
    return next((m for m in ("rz", "rm", "rp") if m in instr.mods), None)


def _sum_error(a: Array, b: Array, total: Array) -> Array:
    part = total - a
    return (a - (total - part)) + (b - part)


def _float_binary(fn: Callable[[Array, Array], Array], instr: Instr) -> Callable[..., Array]:
    mode = _mode(instr)
    if mode is None or instr.type is not F32:
        return fn

    def rounded(a: Array, b: Array) -> Array:
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        total = fn(wide_a, wide_b)
        error: Array | float = 0.0
        if fn in (np.add, np.subtract):
            error = _sum_error(wide_a, wide_b if fn is np.add else -wide_b, total)
        return directed(total, error, mode)

    return rounded


def _fma(a: Array, b: Array, c: Array, mode: str | None, kind: PtxType) -> Array:
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    if kind is F64:
        return total  # two roundings: NumPy has no fused f64 operation
    return (
        total.astype(np.float32)
        if mode is None
        else directed(total, _sum_error(product, c.astype(np.float64), total), mode)
    )


# --- integer helpers ----------------------------------------------------------------------------
WIDER = {16: 32, 32: 64}


def mul_high(a: Array, b: Array) -> Array:
    """Upper half of the double-width product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & low, ua >> shift, ub & low, ub >> shift
    middle = ah * bl + (al * bl >> shift)
    high = ah * bh + (middle >> shift) + ((middle & low) + al * bh >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


def shift_left(a: Array, amount: Array) -> Array:
    """Logical shift; amounts of the width or more give zero."""
    bits = a.dtype.itemsize * 8
    shifted = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount >= bits, a.dtype.type(0), shifted)


def shift_right(a: Array, amount: Array) -> Array:
    """Shift right (arithmetic for signed dtypes), clamped at the width."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), shifted)


def field_mask(length: Array) -> Array:
    """``length`` low one-bits as uint64 (length up to 64)."""
    return np.where(
        length >= 64,
        np.uint64(2**64 - 1),
        (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1),
    )


def bit_field_extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: bits [position, position + length), sign-extended for signed dtypes."""
    bits = a.dtype.itemsize * 8
    position, length = position & 0xFF, length & 0xFF
    wide = a.astype(np.int64).view(np.uint64)
    mask = field_mask(length)
    valid = np.where(position >= bits, np.uint64(0), field_mask(bits - np.minimum(position, bits)))
    source = wide & field_mask(np.uint32(bits))
    result = (source >> np.minimum(position, 63).astype(np.uint64)) & mask & valid
    if a.dtype.kind == "i":
        top = np.minimum(position.astype(np.int64) + length - 1, bits - 1)
        sign = (source >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)
        result = np.where((sign == 1) & (length > 0), result | ~(mask & valid), result)
    return result.astype(np.uint64).view(np.int64).astype(a.dtype)


def bit_field_insert(value: Array, base: Array, position: Array, length: Array) -> Array:
    """bfi: put the low ``length`` bits of ``value`` into ``base`` at ``position``."""
    position, length = position & 0xFF, length & 0xFF
    shift = np.minimum(position, 63).astype(np.uint64)
    mask = np.where(position >= 64, np.uint64(0), field_mask(length) << shift)
    return ((base.astype(np.uint64) & ~mask) | ((value.astype(np.uint64) << shift) & mask)).astype(
        base.dtype
    )


def count_leading_zeros(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    value, count = a.astype(np.uint64), np.zeros(a.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        if step < bits:
            high = value >> np.uint64(step)
            count += np.where(high != 0, np.uint32(step), np.uint32(0))
            value = np.where(high != 0, high, value)
    return np.uint32(bits) - count - (value != 0).astype(np.uint32)


def bit_reverse(a: Array) -> Array:
    value, bits = a.copy(), a.dtype.itemsize * 8
    masks = {
        1: 0x5555555555555555,
        2: 0x3333333333333333,
        4: 0x0F0F0F0F0F0F0F0F,
        8: 0x00FF00FF00FF00FF,
        16: 0x0000FFFF0000FFFF,
        32: 0x00000000FFFFFFFF,
    }
    for step, mask in masks.items():
        if step < bits:
            m, s = a.dtype.type(mask & (2**bits - 1)), a.dtype.type(step)
            value = ((value >> s) & m) | ((value & m) << s)
    return value


# --- arithmetic ---------------------------------------------------------------------------------
_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@alu("add", "sub", "mul")
def _binary(i: Instr) -> Alu:
    kind, fn = i.type, _BINARY[i.op]
    if "cc" in i.mods:
        raise unsupported(i)
    if kind.is_float:
        return Alu(kind, (kind, kind), _post(i, kind, _float_binary(fn, i)))
    if "wide" in i.mods:
        wide = TYPES[f"{kind.kind}{WIDER[kind.bits]}"]
        dtype = np.dtype(f"{'i' if kind.kind == 's' else 'u'}{wide.bits // 8}")
        return Alu(wide, (kind, kind), lambda a, b: np.multiply(a, b, dtype=dtype))
    if "hi" in i.mods:
        return Alu(kind, (kind, kind), mul_high)
    if "sat" in i.mods:
        return Alu(
            kind, (kind, kind), lambda a, b: np.clip(fn(a.astype(np.int64), b), -(2**31), 2**31 - 1)
        )
    return Alu(kind, (kind, kind), fn)


@alu("mad", "fma")
def _mad(i: Instr) -> Alu:
    kind, mode = i.type, _mode(i)
    if "cc" in i.mods:
        raise unsupported(i)
    if kind.is_float:
        return Alu(kind, (kind,) * 3, _post(i, kind, lambda a, b, c: _fma(a, b, c, mode, kind)))
    if "wide" in i.mods:
        wide = TYPES[f"{kind.kind}{WIDER[kind.bits]}"]
        return Alu(wide, (kind, kind, wide), lambda a, b, c: np.multiply(a, b, dtype=c.dtype) + c)
    if "hi" in i.mods:
        return Alu(kind, (kind,) * 3, lambda a, b, c: mul_high(a, b) + c)
    return Alu(kind, (kind,) * 3, lambda a, b, c: a * b + c)


@alu("mul24", "mad24")
def _mul24(i: Instr) -> Alu:
    kind = i.type
    shift = np.int64(40)

    def low24(a: Array) -> Array:
        wide = a.astype(np.int64)
        return (wide << shift) >> shift if kind.kind == "s" else wide & 0xFFFFFF

    high = "hi" in i.mods
    if i.op == "mul24":
        return Alu(kind, (kind, kind), lambda a, b: low24(a) * low24(b) >> (16 if high else 0))
    return Alu(kind, (kind,) * 3, lambda a, b, c: (low24(a) * low24(b) >> (16 if high else 0)) + c)


@alu("div", "rem")
def _divide(i: Instr) -> Alu:
    kind = i.type
    if kind.is_float:
        return Alu(kind, (kind, kind), _post(i, kind, _float_binary(np.divide, i)))

    def remainder(a: Array, b: Array) -> Array:
        return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))

    def quotient(a: Array, b: Array) -> Array:
        safe = np.where(b == 0, b.dtype.type(1), b)
        return np.where(b == 0, ~b.dtype.type(0), (a - np.fmod(a, safe)) // safe)

    return Alu(kind, (kind, kind), remainder if i.op == "rem" else quotient)


@alu("min", "max")
def _extreme(i: Instr) -> Alu:
    kind = i.type
    if "xorsign" in i.mods or len(i.operands) > 3:
        raise unsupported(i)
    if kind.is_float:
        table = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
        return Alu(kind, (kind, kind), _post(i, kind, table[i.op]["NaN" in i.mods]))
    return Alu(kind, (kind, kind), np.minimum if i.op == "min" else np.maximum)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "ex2": np.exp2,
    "lg2": np.log2,
}


@alu(*_UNARY)
def _unary(i: Instr) -> Alu:
    kind, fn, mode = i.type, _UNARY[i.op], _mode(i)
    if i.op in ("neg", "abs"):
        return Alu(kind, (kind,), _post(i, kind, fn))

    def precise(a: Array) -> Array:
        exact = fn(a.astype(np.float64))
        if kind is F64:
            return exact
        return exact.astype(np.float32) if mode is None else directed(exact, 0.0, mode)

    return Alu(kind, (kind,), _post(i, kind, precise))


@alu("copysign")
def _copysign(i: Instr) -> Alu:
    return Alu(i.type, (i.type, i.type), lambda a, b: np.copysign(b, a))


@alu("testp")
def _testp(i: Instr) -> Alu:
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
    }
    return Alu(PRED, (i.type,), tests[i.parts[1]])


@alu("sad")
def _sad(i: Instr) -> Alu:
    return Alu(i.type, (i.type,) * 3, lambda a, b, c: c + (np.maximum(a, b) - np.minimum(a, b)))


@alu("dp4a")
def _dp4a(i: Instr) -> Alu:
    left, right = i.types
    dtypes = [np.int8 if t.kind == "s" else np.uint8 for t in (left, right)]
    dest = S32 if "s" in (left.kind, right.kind) else U32

    def dot(a: Array, b: Array, c: Array) -> Array:
        x, y = (
            np.ascontiguousarray(v).view(d).reshape(-1, 4).astype(np.int64)
            for v, d in zip((a, b), dtypes, strict=True)
        )
        return (x * y).sum(axis=1) + c

    return Alu(dest, (U32, U32, dest), dot)


# --- logic --------------------------------------------------------------------------------------
@alu("and", "or", "xor")
def _logic(i: Instr) -> Alu:
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.op]
    return Alu(i.type, (i.type, i.type), fn)


@alu("not")
def _not(i: Instr) -> Alu:
    return Alu(i.type, (i.type,), np.invert)


@alu("cnot")
def _cnot(i: Instr) -> Alu:
    return Alu(i.type, (i.type,), lambda a: a == 0)


@alu("shl", "shr")
def _shift(i: Instr) -> Alu:
    return Alu(i.type, (i.type, U32), shift_left if i.op == "shl" else shift_right)


@alu("shf")
def _funnel(i: Instr) -> Alu:
    wrap, left = "wrap" in i.mods, "l" in i.mods

    def shift(low: Array, high: Array, amount: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, 32)).astype(np.uint64)
        return (both << n) >> np.uint64(32) if left else both >> n

    return Alu(B32, (B32, B32, U32), lambda a, b, c: shift(a, b, c) & np.uint64(0xFFFFFFFF))


@alu("lop3")
def _lop3(i: Instr) -> Alu:
    if len(i.operands) != 5 or not isinstance(i.operands[4], Imm):
        raise unsupported(i)
    table = i.operands[4].value

    def look_up(a: Array, b: Array, c: Array, _: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result = result | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )
        return result

    return Alu(B32, (B32,) * 4, look_up)


@alu("prmt")
def _permute(i: Instr) -> Alu:
    if i.mods & {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}:
        raise unsupported(i)

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(1, np.uint64)
        for k in range(4):
            nibble = (selector >> np.uint32(4 * k)).astype(np.uint64)
            byte = (both >> ((nibble & np.uint64(7)) << np.uint64(3))) & np.uint64(0xFF)
            sign = np.where(byte >= 128, np.uint64(0xFF), np.uint64(0))
            result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * k))
        return result

    return Alu(B32, (B32, B32, U32), permute)


@alu("bfe")
def _bfe(i: Instr) -> Alu:
    return Alu(i.type, (i.type, U32, U32), bit_field_extract)


@alu("bfi")
def _bfi(i: Instr) -> Alu:
    return Alu(i.type, (i.type, i.type, U32, U32), bit_field_insert)


@alu("popc", "clz")
def _count(i: Instr) -> Alu:
    fn = {"popc": lambda a: np.bitwise_count(a).astype(np.uint32), "clz": count_leading_zeros}[i.op]
    return Alu(U32, (i.type,), fn)


@alu("brev")
def _brev(i: Instr) -> Alu:
    return Alu(i.type, (i.type,), bit_reverse)


@alu("bfind")
def _bfind(i: Instr) -> Alu:
    def find(a: Array) -> Array:
        value = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        bits = a.dtype.itemsize * 8
        place = np.uint32(bits - 1) - count_leading_zeros(value.astype(f"u{a.dtype.itemsize}"))
        found = np.uint32(bits - 1) - place if "shiftamt" in i.mods else place
        return np.where(value == 0, np.uint32(0xFFFFFFFF), found)

    return Alu(U32, (i.type,), find)


# --- comparison and selection -------------------------------------------------------------------
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def comparison(instr: Instr) -> Callable[[Array, Array], Array]:
    """The comparison named by the first modifier; ``ltu`` and kin are true for NaN."""
    name = instr.parts[1]
    floating = instr.types[-1].is_float
    if name in _COMPARE:
        fn = _COMPARE[name]
        if name == "ne" and floating:  # ordered: false for NaN, unlike NumPy
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        return fn
    if floating and name.endswith("u") and name[:-1] in _COMPARE:
        fn = _COMPARE[name[:-1]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    raise unsupported(instr)


@alu("setp", "set")
def _setp(i: Instr) -> Alu:
    kind, test = i.types[-1], comparison(i)
    if kind.count > 1:
        raise unsupported(i)
    ftz = "ftz" in i.mods and kind is F32
    combine = next(
        (
            f
            for n, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor))
            if n in i.mods
        ),
        None,
    )

    def compare(a: Array, b: Array, *third: Array) -> Value:
        result = test(flush(a), flush(b)) if ftz else test(a, b)
        first = combine(result, third[0]) if combine else result
        if i.op == "set":
            return first.astype(np.float32) if i.types[0].is_float else -first.astype(np.int32)
        second = combine(~result, third[0]) if combine else ~result
        return first, second

    sources = (kind, kind, PRED) if combine else (kind, kind)
    return Alu(PRED if i.op == "setp" else i.types[0], sources, compare)


@alu("selp")
def _selp(i: Instr) -> Alu:
    kind = TYPES[f"b{i.type.bits}"]
    return Alu(kind, (kind, kind, PRED), lambda a, b, p: np.where(p, a, b))


@alu("slct")
def _slct(i: Instr) -> Alu:
    kind, test = i.types
    return Alu(kind, (kind, kind, test), lambda a, b, c: np.where(c >= 0, a, b))


# --- conversion ---------------------------------------------------------------------------------
_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(value: Array, kind: PtxType) -> Array:
    """Saturating conversion of an integral-valued float; NaN becomes zero."""
    low = 0.0 if kind.kind != "s" else -(2.0 ** (kind.bits - 1))
    high = 2.0 ** (kind.bits - (kind.kind == "s"))
    dtype = np.dtype(f"{'i' if kind.kind == 's' else 'u'}{kind.bits // 8}")
    inside = (value >= low) & (value < high)
    converted = np.where(inside, value, 0.0).astype(dtype)
    limits = np.iinfo(dtype)
    return np.where(
        inside | np.isnan(value),
        converted,
        np.where(value < 0, dtype.type(limits.min), dtype.type(limits.max)),
    )


@alu("cvt")
def _cvt(i: Instr) -> Alu:
    dest, source = i.types[0], i.types[-1]
    if len(i.types) != 2 or i.mods & {"e4m3x2", "e5m2x2", "rs", "satfinite"}:
        raise unsupported(i)
    mode = _mode(i)
    if dest.count == 2:
        if mode:
            raise unsupported(i)
        return Alu(
            dest,
            (source, source),
            _post(i, F32, lambda high, low: np.stack(np.broadcast_arrays(low, high), axis=-1)),
        )
    integral = next((f for n, f in _TO_INTEGRAL.items() if n in i.mods), None)
    if source.is_float and not dest.is_float:

        def to_int(a: Array) -> Array:
            if "ftz" in i.mods and a.dtype == np.float32:
                a = flush(a)
            return float_to_int((integral or np.trunc)(a.astype(np.float64)), dest)

        return Alu(dest, (source,), to_int)
    if source.is_float:

        def convert(a: Array) -> Array:
            value = integral(a) if integral else a
            if dest.name == "tf32":
                return round_to_tf32(value)
            if mode and source is F64 and dest is F32:
                return directed(value, 0.0, mode)
            if mode and dest.bits < source.bits:
                raise unsupported(i)
            return value

        return Alu(dest, (source,), _post(i, F32, convert))
    if dest.is_float:

        def from_int(a: Array) -> Array:
            if mode and dest is F32:
                return directed(a.astype(np.float64), 0.0, mode)
            return a.astype(np.float64 if dest is F64 else np.float32)

        return Alu(dest, (source,), from_int)
    dtype = np.dtype(f"{'i' if dest.kind == 's' else 'u'}{dest.bits // 8}")
    if "sat" in i.mods:
        limits = np.iinfo(dtype)
        return Alu(
            dest,
            (source,),
            lambda a: np.clip(
                a,
                max(int(limits.min), int(np.iinfo(a.dtype).min)),
                min(int(limits.max), int(np.iinfo(a.dtype).max)),
            ).astype(dtype),
        )
    return Alu(dest, (source,), lambda a: a.astype(dtype))
