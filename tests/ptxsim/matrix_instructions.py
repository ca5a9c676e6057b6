"""ldmatrix, stmatrix and mma: tensor-core fragments as the PTX manual lays them out."""

from __future__ import annotations

import numpy as np

from .alu import unsupported
from .dtypes import TYPES, Array, PtxType
from .machine import Machine, Step
from .memory import SHARED_BASE, Access
from .operands import (
    B32,
    check_whole_warps,
    count_access,
    memory_address,
    opcode,
    scatter,
    space_of,
    vector_of,
)
from .parser import Instr, Operand
from .program import Program


@opcode("ldmatrix", "stmatrix")
def _matrix_move(instr: Instr, program: Program, _: int) -> Step:
    if "m8n8" not in instr.mods or "b16" not in instr.mods:
        raise unsupported(instr)
    storing = instr.op == "stmatrix"
    memory, registers = instr.operands if storing else instr.operands[::-1]
    items, trans = vector_of(registers), "trans" in instr.mods
    count = len(items)
    addresses, _slots = memory_address(instr, program, memory)
    readers = [program.reader(i, B32) for i in items] if storing else []
    writers = [] if storing else [program.writer(i, B32) for i in items]

    def rows(m: Machine) -> tuple[Access, Array]:
        """Access and addresses of the row-providing lanes, as (warps, count * 8)."""
        check_whole_warps(m, instr)
        used = m.active.reshape(-1, 32)[:, : count * 8]
        addr = addresses(m).reshape(-1, 32)[:, : count * 8]
        if space_of(instr) == "generic":
            addr = addr - np.uint64(SHARED_BASE)
        access = Access(m, instr, np.ascontiguousarray(used).reshape(-1))
        for part in range(count):  # one phase per matrix
            count_access(
                m,
                instr,
                "shared",
                used[:, part * 8 : part * 8 + 8].reshape(-1),
                addr[:, part * 8 : part * 8 + 8].reshape(-1),
                16,
            )
        return access, np.ascontiguousarray(addr).reshape(-1)

    def load(m: Machine) -> None:
        access, addr = rows(m)
        values, bad = m.shared.load(access, addr, np.dtype(np.uint32), 4)
        halves = (
            np.ascontiguousarray(values.T).view(np.uint16).reshape(-1, count, 8, 8)
        )  # warp, matrix, row, column
        if trans:
            halves = halves.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
        for k, write in enumerate(writers):
            poison = None
            if bad is not None:
                rows_bad = bad.reshape(-1, count, 8)[:, k]
                spread = (
                    np.repeat(rows_bad, 4, axis=1)
                    if not trans
                    else np.repeat(rows_bad.any(1), 32).reshape(-1, 32)
                )
                poison = np.zeros(m.lanes, bool)
                poison[m.active] = spread.reshape(-1)
            write(m, scatter(m, np.ascontiguousarray(fragments[:, k]).reshape(-1)), poison)

    def store(m: Machine) -> None:
        access, addr = rows(m)
        fragments = np.stack([m.spread(r(m))[m.active].reshape(-1, 8, 4) for r in readers], axis=1)
        halves = np.ascontiguousarray(fragments).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            halves = halves.transpose(0, 1, 3, 2)
        m.shared.store(access, addr, np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 4).T)

    return store if storing else load


_INPUTS = {"f16", "bf16", "tf32", "s8", "u8"}


@opcode("mma")
def _mma(instr: Instr, program: Program, _: int) -> Step:
    parts = instr.parts
    shape = next(p for p in parts if p.startswith("m") and p[1:2].isdigit())
    rows, columns, depth = (
        int(x) for x in shape.replace("m", " ").replace("n", " ").replace("k", " ").split()
    )
    kinds = [p for p in parts[parts.index(shape) + 1 :] if p in TYPES]
    if (
        rows != 16
        or columns != 8
        or len(kinds) != 4
        or kinds[1] not in _INPUTS
        or "sp" in instr.mods
        or ("satfinite" in instr.mods) != (kinds[0] == "s32")
    ):
        raise unsupported(instr)
    dest, left, right, base = (TYPES[k] for k in kinds)
    a, b, c = (vector_of(o) for o in instr.operands[1:4])
    d = vector_of(instr.operands[0])
    read_a, read_b, read_c = ([program.reader(o, B32) for o in group] for group in (a, b, c))
    writers = [program.writer(o, B32) for o in d]
    per = 32 // left.bits  # elements of A and B in one register
    slots = program.slots_in(*a, *b, *c)
    integer = not left.is_float

    def gather(m: Machine, readers: list, kind: PtxType) -> Array:
        """Fragments as (warps, group, thread in group, register, element)."""
        raw = np.stack([m.spread(r(m)) for r in readers], axis=-1)
        count = 32 // kind.bits
        values = kind.decode(np.ascontiguousarray(raw).view(kind.raw).reshape(-1))
        return values.reshape(-1, 8, 4, len(readers), count)

    def matrices(fragment_a: Array, fragment_b: Array) -> tuple[Array, Array]:
        n = fragment_a.shape[0]
        # A register r holds row g + 8 * (r & 1), columns (r >> 1) * 4 * per + t * per + e
        x = (
            fragment_a.reshape(n, 8, 4, -1, 2, per)
            .transpose(0, 4, 1, 3, 2, 5)
            .reshape(n, 16, depth)
        )
        # B register r holds column g, rows r * 4 * per + t * per + e
        y = fragment_b.transpose(0, 3, 2, 4, 1).reshape(n, depth, 8)
        return x, y

    def unpack_c(values: Array) -> Array:
        # element pair r of C holds row g + 8 * r, columns 2 * t + e
        return values.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)

    def pack_c(matrix: Array) -> Array:
        return matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)

    def multiply(m: Machine) -> None:
        check_whole_warps(m, instr)
        x, y = matrices(gather(m, read_a, left), gather(m, read_b, right))
        accumulator = unpack_c(gather(m, read_c, base))
        wide = np.int64 if integer else np.float64
        result = np.matmul(x.astype(wide), y.astype(wide)) + accumulator
        poison = m.poison_of(slots)
        bad = (
            np.broadcast_to(np.zeros(1, bool), (m.lanes, 4))
            if poison is None
            else pack_c(spoiled(m))
        )
        if integer:  # .satfinite: clamped
            result = result.clip(-(2**31), 2**31 - 1)
        flat = pack_c(result)
        if dest.bits == 32:
            raw = dest.encode(flat.astype(np.int32 if integer else np.float32))
            for k, write in enumerate(writers):
                write(
                    m,
                    np.ascontiguousarray(raw[:, k]),
                    None if poison is None else np.ascontiguousarray(bad[:, k]),
                )
        else:
            raw = np.ascontiguousarray(dest.encode(flat.astype(np.float32))).view(np.uint32)
            for k, write in enumerate(writers):
                write(
                    m,
                    np.ascontiguousarray(raw[:, k]),
                    None if poison is None else bad[:, 2 * k : 2 * k + 2].any(1),
                )

    def spoiled(m: Machine) -> Array:
        """Which result elements depend on an undefined input."""

        def flags(operands: tuple[Operand, ...], width: int) -> Array:
            none = np.zeros(m.lanes, bool)
            each = [
                p if (p := m.poison_of(program.slots_in(o))) is not None else none for o in operands
            ]
            return np.repeat(np.stack(each, axis=-1)[:, :, None], width, axis=2).reshape(
                -1, 8, 4, len(operands), width
            )

        x, y = matrices(flags(a, per), flags(b, per))
        return (
            x.any(axis=2)[:, :, None]
            | y.any(axis=1)[:, None, :]
            | unpack_c(flags(c, 32 // base.bits))
        )

    return multiply
