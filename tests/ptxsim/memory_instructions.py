"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .alu import unsupported
from .bulk_copies import bulk_copy
from .dtypes import Array, PtxType
from .errors import OutOfBounds
from .machine import Machine, PendingCopy, Step
from .memory import PARAM_START, Access
from .operands import (
    U32,
    by_space,
    count_access,
    memory_address,
    opcode,
    scatter,
    space_of,
    vector_of,
)
from .parser import Imm, Instr, Operand, Vec
from .program import Program


@opcode("ld", "ldu")
def _load(instr: Instr, program: Program, _: int) -> Step:
    space, kind = space_of(instr), instr.type
    dests = vector_of(instr.operands[0])
    if space == "param":
        return _load_param(instr, program, dests, kind)
    writers = [program.writer(d, kind) for d in dests]
    addresses, _slots = memory_address(instr, program, instr.operands[1])

    def load(m: Machine) -> None:
        addr, lanes = addresses(m), m.active
        values = np.empty((len(dests), addr.size), kind.raw)
        undefined = None
        for where, offset, chosen in by_space(space, addr):
            access = Access(m, instr, lanes[chosen])
            count_access(m, instr, where, access.lanes, offset, kind.nbytes * len(dests))
            if where in ("shared", "local"):
                memory = m.shared if where == "shared" else m.local
                values[:, chosen], bad = memory.load(access, offset, kind.raw, len(dests))
                if bad is not None:
                    undefined = np.zeros(m.lanes, bool) if undefined is None else undefined
                    undefined[access.lanes] = bad
            else:
                values[:, chosen] = m.memory.load(access, offset, kind.raw, len(dests))
        for write, value in zip(writers, values, strict=True):
            write(m, scatter(m, value), undefined)

    return load


def _load_param(instr: Instr, program: Program, dests: tuple[Operand, ...], kind: PtxType) -> Step:
    """Parameters are one string of bytes, the same for all lanes; an address may be computed."""
    writers = [program.writer(d, kind) for d in dests]
    addresses, _slots = memory_address(instr, program, instr.operands[1])
    nbytes = kind.nbytes * len(dests)

    def load(m: Machine) -> None:
        start = addresses(m).astype(np.int64) - PARAM_START
        bad = (start < 0) | (start + nbytes > len(m.params))
        if bad.any():
            at = int(m.active[int(bad.argmax())])
            m.fail(OutOfBounds, instr, f"reads past the {len(m.params)} bytes of parameters", at)
        first = int(start[0])
        if (start == first).all():
            for k, write in enumerate(writers):
                write(m, np.frombuffer(m.params, kind.raw, 1, first + k * kind.nbytes), None)
            return
        data = np.frombuffer(m.params, np.uint8)
        for k, write in enumerate(writers):
            index = start[:, None] + k * kind.nbytes + np.arange(kind.nbytes)
            values = np.ascontiguousarray(data[index]).view(kind.raw).reshape(-1)
            write(m, scatter(m, values), None)

    return load


@opcode("st")
def _store(instr: Instr, program: Program, _: int) -> Step:
    space, kind = space_of(instr), instr.type
    if space == "param" or "async" in instr.mods:
        raise unsupported(instr)
    sources = vector_of(instr.operands[1])
    readers, slots = [program.reader(s, kind) for s in sources], program.slots_in(*sources)
    addresses, _slots = memory_address(instr, program, instr.operands[0])

    def store(m: Machine) -> None:
        addr, lanes = addresses(m), m.active
        values = np.stack([m.spread(r(m))[lanes] for r in readers])
        poison = m.poison_of(slots)
        for where, offset, chosen in by_space(space, addr):
            access = Access(m, instr, lanes[chosen])
            count_access(m, instr, where, access.lanes, offset, kind.nbytes * len(sources))
            if where in ("shared", "local"):
                memory = m.shared if where == "shared" else m.local
                memory.store(
                    access,
                    offset,
                    values[:, chosen],
                    None if poison is None else poison[access.lanes],
                )
            else:
                if poison is not None:
                    m.require_defined(instr, slots, "stored value")
                m.memory.store(access, offset, values[:, chosen])

    return store


ATOMIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(
        old.dtype
    ),
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


@opcode("atom", "red")
def _atomic(instr: Instr, program: Program, _: int) -> Step:
    if "async" in instr.mods or isinstance(instr.operands[-1], Vec):
        raise unsupported(instr)
    kind, space = instr.type, space_of(instr)
    name = next((p for p in instr.parts if p in ATOMIC), None)
    if name is None:
        raise unsupported(instr)
    operate = ATOMIC[name]
    returns = instr.op == "atom"
    target, *rest = instr.operands[1:] if returns else instr.operands
    rest = rest[: 2 if name == "cas" else 1]
    readers, slots = [program.reader(o, kind) for o in rest], program.slots_in(*rest)
    write = program.writer(instr.operands[0], kind) if returns else None
    addresses, _slots = memory_address(instr, program, target)

    def update(old: Array, *values: Array) -> Array:
        return kind.encode(operate(kind.decode(old), *[kind.decode(v) for v in values]))

    def atomic(m: Machine) -> None:
        m.require_defined(instr, slots, "atomic operand")
        addr, lanes = addresses(m), m.active
        values = [m.spread(r(m))[lanes] for r in readers]
        old = np.empty(addr.size, kind.raw)
        for where, offset, chosen in by_space(space, addr):
            memory = m.shared if where == "shared" else m.memory
            if where == "local":
                raise unsupported(instr)
            old[chosen] = memory.atomic(
                Access(m, instr, lanes[chosen]), offset, [v[chosen] for v in values], update
            )
        if write:
            write(m, scatter(m, old), None)

    return atomic


@opcode("cp")
def _cp(instr: Instr, program: Program, block: int) -> Step:
    if ("bulk" in instr.mods and "tensor" in instr.mods) or "shared::cluster" in instr.mods:
        return bulk_copy(instr, program)
    if instr.parts[1] != "async" or instr.mods & {"bulk", "mbarrier", "reduce"}:
        raise unsupported(instr)
    if "commit_group" in instr.mods:

        def commit(m: Machine) -> None:
            m.copy_group = m.copy_group + m.mask

        return commit
    if "wait_group" in instr.mods or "wait_all" in instr.mods:
        keep = instr.operands[0].value if instr.operands else -1
        return lambda m: finish_copies(m, keep)
    if not isinstance(instr.operands[2], Imm):
        raise unsupported(instr)
    size = instr.operands[2].value
    extra = [o for o in instr.operands[3:4]] if "cache_hint" not in "".join(instr.parts) else []
    source_size = program.reader(extra[0], U32) if extra else None
    to, _a = memory_address(instr, program, instr.operands[0])
    source, _b = memory_address(instr, program, instr.operands[1])
    dtype = np.dtype(np.uint32)

    def copy(m: Machine) -> None:
        lanes, dest, origin = m.active, to(m), source(m)
        access = Access(m, instr, lanes)
        access.check_aligned(origin, size)
        values = np.zeros((size // 4, lanes.size), dtype)
        wanted = (
            np.full(lanes.size, size)
            if source_size is None
            else m.spread(source_size(m))[lanes].astype(np.int64)
        )
        for amount in np.unique(wanted):
            if amount:
                chosen = np.flatnonzero(wanted == amount)
                whole = np.dtype(f"u{min(amount & -amount, 4)}")
                part = m.memory.load_unaligned(
                    Access(m, instr, lanes[chosen]),
                    origin[chosen],
                    whole,
                    int(amount) // whole.itemsize,
                )
                padded = np.zeros((size // whole.itemsize, chosen.size), whole)
                padded[: len(part)] = part
                values[:, chosen] = np.ascontiguousarray(padded.T).view(dtype).T
        count_access(m, instr, "global", lanes, origin, size)
        m.shared.begin_copy(access, dest, size)
        m.copies.append(PendingCopy(instr, lanes, m.copy_group[lanes], dest, values))

    return copy


def finish_copies(m: Machine, keep: int) -> None:
    """Deliver the active lanes' copies, but for the newest ``keep`` groups (-1: everything)."""
    remaining = []
    for copy in m.copies:
        limit = m.copy_group[copy.lanes] - keep
        done = m.mask[copy.lanes] & ((copy.group < limit) if keep >= 0 else True)
        if done.any():
            m.shared.finish_copy(
                Access(m, copy.instr, copy.lanes[done]), copy.addr[done], copy.values[:, done]
            )
        if not done.all():
            left = ~done
            remaining.append(
                PendingCopy(
                    copy.instr,
                    copy.lanes[left],
                    copy.group[left],
                    copy.addr[left],
                    copy.values[:, left],
                )
            )
    m.copies = remaining
