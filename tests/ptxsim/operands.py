"""What instructions share: registration, address operands, statistics, warp masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .alu import unsupported
from .dtypes import TYPES, Array
from .errors import WarpMaskError
from .machine import Machine, Step
from .memory import LOCAL_BASE, SHARED_BASE
from .parser import Instr, Mem, Operand, Vec
from .program import Program
from .stats import MemoryStat, sectors, wavefronts

Compiler = Callable[[Instr, Program, int], Step]
OPCODES: dict[str, Compiler] = {}
"""``OPCODES[op](instr, program, block)`` compiles one instruction into a step ``run(machine)``."""

U32, U64, B32, PRED = (TYPES[n] for n in ("u32", "u64", "b32", "pred"))
SPACES = ("global", "shared", "local", "param", "const")


def opcode(*names: str) -> Callable[[Compiler], Compiler]:
    """Register a compiler for one or more opcodes."""

    def register(compiler: Compiler) -> Compiler:
        OPCODES.update(dict.fromkeys(names, compiler))
        return compiler

    return register


def memory_address(
    instr: Instr, program: Program, operand: Operand
) -> tuple[Callable[[Machine], Array], tuple[int, ...]]:
    """Reader of the active lanes' byte addresses (uint64), and the registers it depends on."""
    if not isinstance(operand, Mem):
        raise unsupported(instr)
    read, offset = program.reader(operand.base, U64), np.uint64(operand.offset & (2**64 - 1))
    slots = program.slots_in(operand.base)

    def addresses(m: Machine) -> Array:
        m.require_defined(instr, slots, "address")
        base = read(m)
        base = base[m.active] if base.size > 1 else np.broadcast_to(base, m.active.size)
        return base + offset

    return addresses, slots


def space_of(instr: Instr) -> str:
    return next((p for part in instr.parts if (p := part.split("::")[0]) in SPACES), "generic")


def by_space(space: str, addr: Array) -> list[tuple[str, Array, slice | Array]]:
    """Split generic addresses into (space, window offset, positions)."""
    if space != "generic":
        return [(space, addr, slice(None))]
    groups: list[tuple[str, Array, slice | Array]] = []
    shared = (addr >= np.uint64(SHARED_BASE)) & (addr < np.uint64(LOCAL_BASE))
    local = (addr >= np.uint64(LOCAL_BASE)) & (addr < np.uint64(2 * LOCAL_BASE))
    for name, chosen, base in (
        ("global", ~(shared | local), 0),
        ("shared", shared, SHARED_BASE),
        ("local", local, LOCAL_BASE),
    ):
        if chosen.all():
            return [(name, addr - np.uint64(base), slice(None))]
        if chosen.any():
            where = np.flatnonzero(chosen)
            groups.append((name, addr[where] - np.uint64(base), where))
    return groups


def count_access(
    m: Machine, instr: Instr, space: str, lanes: Array, addr: Array, nbytes: int
) -> None:
    """Record coalescing or bank-conflict statistics of one access."""
    if not m.options.statistics or space not in ("global", "shared"):
        return
    grid = np.zeros(m.lanes, np.uint64)
    active = np.zeros(m.lanes, bool)
    grid[lanes], active[lanes] = addr, True
    measure = sectors if space == "global" else wavefronts
    requests, units, ideal = measure(grid.reshape(-1, 32), active.reshape(-1, 32), nbytes)
    stat = m.stats.memory.setdefault(instr.line, MemoryStat(instr.where, space))
    stat.requests += requests
    stat.units += units
    stat.ideal += ideal


def vector_of(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vec) else (operand,)


def scatter(m: Machine, values: Array) -> Array:
    """Active-lane values to a full register array."""
    if values.size == m.lanes:
        return values
    full = np.zeros(m.lanes, values.dtype)
    full[m.active] = values
    return full


BITS = np.uint64(1) << np.arange(32, dtype=np.uint64)


def ballot(lanes: Array) -> Array:
    """(warps,) bit masks of a per-lane bool array."""
    return (lanes.reshape(-1, 32) * BITS).sum(axis=1).astype(np.uint32)


def check_members(m: Machine, instr: Instr, members: Array) -> None:
    """Every live thread that a membermask names must be here, and name itself."""
    named = m.spread(members).reshape(-1, 32)
    if m.full and m.all_alive and bool((members == np.uint32(0xFFFFFFFF)).all()):
        return
    active = m.mask.reshape(-1, 32)
    missing = named & (ballot(m.alive) & ~ballot(m.mask))[:, None]
    own = named & BITS.astype(np.uint32)
    for bad, text in (
        (active & (missing != 0), "names live threads that are not at this instruction"),
        (active & (own == 0), "lacks the executing thread"),
    ):
        if bad.any():
            lane = int(bad.reshape(-1).argmax())
            m.fail(
                WarpMaskError,
                instr,
                f"membermask {int(named.reshape(-1)[lane]):#010x} {text}",
                lane,
            )


def check_whole_warps(m: Machine, instr: Instr) -> None:
    """mma, ldmatrix and kin need every thread of the warp."""
    if m.full and m.all_alive:
        return
    active = m.mask.reshape(-1, 32)
    partial = active.any(axis=1) & ~active.all(axis=1)
    if partial.any():
        m.fail(
            WarpMaskError,
            instr,
            "not all 32 threads of the warp execute it",
            int(partial.argmax()) * 32,
        )
