"""Single instructions against plain-Python references on random and edge-case operands."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import ptxsim
import pytest

EDGES = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    255,
    256,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x3210,
    0x7654,
    0xFEDC9810,
]
M32 = 0xFFFFFFFF


def s32(v: int) -> int:
    return v - 2**32 if v & 0x80000000 else v


def run(op: str, *columns: list[int], wide: bool = False, extra: str = "") -> list[int]:
    """``op dest, a, b, ...`` for every row, on raw bits: 32 of them, 64 of a ``wide`` result."""
    n = len(columns[0])
    arrays = [np.array(c, np.uint64).astype(np.uint32) for c in columns]
    out = np.zeros(n, np.uint64 if wide else np.uint32)
    size, dest = (8, "%rd9") if wide else (4, "%r9")
    loads = "".join(
        f"ld.param.u64 %rd1, [p{k}]; add.s64 %rd1, %rd1, %rd3; ld.global.b32 %r{k + 1}, [%rd1];\n"
        for k in range(len(arrays))
    )
    names = ", ".join(f"%r{k + 1}" for k in range(len(arrays)))
    params = ", ".join(f".param .u64 p{k}" for k in range(len(arrays) + 1))
    text = (
        f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k({params})\n{{\n"
        ".reg .pred %p<4>; .reg .b32 %r<10>; .reg .b64 %rd<10>;\n"
        "mov.u32 %r9, %tid.x; mul.wide.u32 %rd3, %r9, 4;\n"
        + loads
        + f"{op} {dest}, {names}{extra};\n"
        f"mov.u32 %r8, %tid.x; mul.wide.u32 %rd4, %r8, {size}; "
        f"ld.param.u64 %rd1, [p{len(arrays)}];\n"
        f"add.s64 %rd1, %rd1, %rd4; st.global.b{size * 8} [%rd1], {dest};\nret;\n}}\n"
    )
    ptxsim.load(text).launch("k", 1, n, [*arrays, out])
    return [int(v) for v in out]


def operands(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    columns = [[int(v) for v in rng.integers(0, 2**32, 300)] for _ in range(count)]
    for k, column in enumerate(columns):
        column += [EDGES[(i * (k + 1) + k) % len(EDGES)] for i in range(200)]
    return columns


def bfe(a: int, pos: int, length: int, signed: bool) -> int:
    pos, length = pos & 255, length & 255
    sign = (a >> min(pos + length - 1, 31) & 1) if signed and length else 0
    return sum(
        ((a >> (pos + i) & 1) if i < length and pos + i <= 31 else sign) << i for i in range(32)
    )


def bfi(a: int, b: int, pos: int, length: int) -> int:
    pos, length = pos & 255, length & 255
    for i in range(length):
        if pos + i < 32:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


def prmt(a: int, b: int, c: int) -> int:
    both, result = b << 32 | a, 0
    for k in range(4):
        nibble = c >> 4 * k & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * k
    return result


def trunc_div(a: int, b: int) -> int:
    return int(Fraction(a, b))


CASES: dict[str, tuple[int, Callable[..., int]]] = {
    "add.s32": (2, lambda a, b: a + b),
    "sub.u32": (2, lambda a, b: a - b),
    "mul.lo.s32": (2, lambda a, b: a * b),
    "mul.hi.u32": (2, lambda a, b: a * b >> 32),
    "mul.hi.s32": (2, lambda a, b: s32(a) * s32(b) >> 32),
    "mad.lo.s32": (3, lambda a, b, c: a * b + c),
    "mad.hi.u32": (3, lambda a, b, c: (a * b >> 32) + c),
    "min.s32": (2, lambda a, b: min(s32(a), s32(b))),
    "max.u32": (2, max),
    "abs.s32": (1, lambda a: abs(s32(a))),
    "shl.b32": (2, lambda a, b: a << b if b < 32 else 0),
    "shr.u32": (2, lambda a, b: a >> min(b, 32)),
    "shr.s32": (2, lambda a, b: s32(a) >> min(b, 31)),
    "xor.b32": (2, lambda a, b: a ^ b),
    "not.b32": (1, lambda a: ~a),
    "popc.b32": (1, int.bit_count),
    "clz.b32": (1, lambda a: 32 - a.bit_length()),
    "brev.b32": (1, lambda a: int(f"{a:032b}"[::-1], 2)),
    "bfind.u32": (1, lambda a: a.bit_length() - 1),
    "shf.l.wrap.b32": (3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.wrap.b32": (3, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.r.clamp.b32": (3, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "bfe.u32": (3, lambda a, b, c: bfe(a, b, c, False)),
    "bfe.s32": (3, lambda a, b, c: bfe(a, b, c, True)),
    "bfi.b32": (4, bfi),
    "prmt.b32": (3, prmt),
    "sad.u32": (3, lambda a, b, c: abs(a - b) + c),
    "cvt.s32.s8": (1, lambda a: (a & 255) - (a & 128) * 2),
    "cvt.u32.u16": (1, lambda a: a & 0xFFFF),
    "cvt.sat.u32.s32": (1, lambda a: max(s32(a), 0)),
}


@pytest.mark.parametrize("op", CASES)
def test_integer_instruction(op):
    count, reference = CASES[op]
    columns = operands(count)
    assert run(op, *columns) == [reference(*row) & M32 for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    "op, signed", [("div.s32", True), ("rem.s32", True), ("div.u32", False), ("rem.u32", False)]
)
def test_division(op, signed):
    a, b = operands(2)
    b = [v or 7 for v in b]
    convert = s32 if signed else int
    pairs = [(convert(x), convert(y)) for x, y in zip(a, b, strict=True)]
    expected = [trunc_div(x, y) if op[0] == "d" else x - trunc_div(x, y) * y for x, y in pairs]
    assert run(op, a, b) == [v & M32 for v in expected]


def test_lop3_and_wide_multiply():
    a, b, c = operands(3)
    assert run("lop3.b32", a, b, c, extra=", 0x96") == [
        x ^ y ^ z for x, y, z in zip(a, b, c, strict=True)
    ]
    assert run("lop3.b32", a, b, c, extra=", 0xEA") == [
        x & y | z for x, y, z in zip(a, b, c, strict=True)
    ]
    assert run("mul.wide.s32", a, b, wide=True) == [
        s32(x) * s32(y) % 2**64 for x, y in zip(a, b, strict=True)
    ]


def bits(v: float) -> int:
    return struct.unpack("<I", struct.pack("<f", v))[0]


def number(v: int) -> float:
    return struct.unpack("<f", struct.pack("<I", v))[0]


@pytest.mark.parametrize("mode", ["rm", "rp", "rz"])
@pytest.mark.parametrize("op", ["add", "fma"])
def test_directed_rounding_brackets_the_exact_value(op, mode):
    rng = np.random.default_rng(3)
    columns = [
        [
            bits(float(v))
            for v in rng.standard_normal(400).astype(np.float32) * 10.0 ** rng.integers(-4, 5)
        ]
        for _ in range(3 if op == "fma" else 2)
    ]
    out = [number(v) for v in run(f"{op}.{mode}.f32", *columns)]
    for *raw, got in zip(*columns, out, strict=True):
        x = [Fraction(number(v)) for v in raw]
        exact = x[0] + x[1] if op == "add" else x[0] * x[1] + x[2]
        toward_minus = mode == "rm" or (mode == "rz" and exact > 0)
        step = np.nextafter(np.float32(got), np.float32(np.inf if toward_minus else -np.inf))
        if toward_minus:
            assert Fraction(got) <= exact < Fraction(float(step))
        else:
            assert Fraction(float(step)) < exact <= Fraction(got)


def test_float_to_int_saturates():
    values = [
        0.0,
        -0.5,
        2.5,
        3.5,
        -2.5,
        3e9,
        -3e9,
        5e9,
        float("inf"),
        -float("inf"),
        float("nan"),
        1e-40,
    ]
    expected = [0, 0, 2, 4, -2, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0, 0]
    assert run("cvt.rni.s32.f32", [bits(v) for v in values]) == [v & M32 for v in expected]
    assert run("cvt.rzi.u32.f32", [bits(v) for v in values]) == [
        0,
        0,
        2,
        3,
        0,
        3 * 10**9,
        0,
        M32,
        M32,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    "mode, clamp, source",
    [
        ("up", 0, lambda i, b: i - b if i >= b else i),
        ("down", 31, lambda i, b: i + b if i + b < 32 else i),
        ("bfly", 31, lambda i, b: i ^ b),
        ("idx", 31, lambda i, b: b),
    ],
)
def test_shuffle(mode, clamp, source):
    values = list(range(100, 132))
    for b in (0, 1, 5, 16, 31):
        got = run(f"shfl.sync.{mode}.b32", values, extra=f", {b}, {clamp}, -1")
        assert got == [values[source(i, b)] for i in range(32)]


PAIR = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p0)
{
.reg .b32 %r<4>; .reg .b64 %rd<4>;
ld.param.u64 %rd1, [p0];
mov.u32 %r1, 7;
mov.b64 %rd2, {FIRST, SECOND};
cvt.u32.u64 %r3, %rd2;
st.global.b32 [%rd1], %r3;
ret;
}
"""


def test_low_half_of_a_pair() -> None:
    """Of two registers packed into one, an undefined high half does not spoil the low one."""
    out = np.zeros(1, np.uint32)
    ptxsim.load(PAIR.replace("FIRST", "%r1").replace("SECOND", "%r2")).launch("k", 1, 1, [out])
    assert out[0] == 7
    with pytest.raises(ptxsim.UninitialisedRead):
        ptxsim.load(PAIR.replace("FIRST", "%r2").replace("SECOND", "%r1")).launch("k", 1, 1, [out])


def test_parameter_at_a_computed_address() -> None:
    text = PAIR.replace("mov.u32 %r1, 7;", "mov.b64 %rd3, p0; ld.param.b32 %r1, [%rd3+8];")
    text = text.replace(".param .u64 p0", ".param .align 8 .b8 p0[16]")
    text = text.replace("FIRST", "%r1").replace("SECOND", "%r1")
    out = np.zeros(1, np.uint32)
    place = 1 << 44
    packed = struct.pack("<QII", place, 41, 0)
    ptxsim.load(text).launch("k", 1, 1, [packed], 0, [(place, out.view(np.uint8), "out")])
    assert out[0] == 41
