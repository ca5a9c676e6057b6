"""Instructions over the lanes of a warp: shuffles, votes, reductions."""

from __future__ import annotations

import numpy as np

from .alu import unsupported
from .errors import WarpMaskError
from .machine import Machine, Step
from .memory_instructions import ATOMIC
from .operands import B32, BITS, PRED, U32, ballot, check_members, opcode, vector_of
from .parser import Instr, Vec
from .program import Program


@opcode("shfl")
def _shfl(instr: Instr, program: Program, _: int) -> Step:
    if "sync" not in instr.mods:
        raise unsupported(instr)
    dest, source, index, clamp, members = instr.operands
    outputs = dest.items if isinstance(dest, Vec) else (dest,)
    write = program.writer(outputs[0], B32)
    write_valid = program.writer(outputs[1], PRED) if len(outputs) > 1 else None
    read_value, read_index, read_clamp, read_members = (
        program.reader(o, B32) for o in (source, index, clamp, members)
    )
    slots, mode = program.slots_in(source), instr.parts[2]
    lane = np.arange(32)

    def shuffle(m: Machine) -> None:
        named = read_members(m)
        check_members(m, instr, named)
        shape = (-1, 32)
        b = (m.spread(read_index(m)) & np.uint32(31)).reshape(shape).astype(np.int64)
        c = m.spread(read_clamp(m)).reshape(shape).astype(np.int64)
        segment, bound = (c >> 8) & 31, c & 31
        low = lane & segment
        top = low | (bound & ~segment)
        target = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[
            mode
        ]
        valid = target >= top if mode == "up" else target <= top
        target = np.where(valid, target, lane)
        if not (m.full and m.all_alive):
            reached = np.take_along_axis(m.mask.reshape(shape), target, 1)
            bad = m.mask.reshape(shape) & ~reached
            if bad.any():
                at = int(bad.reshape(-1).argmax())
                m.fail(
                    WarpMaskError,
                    instr,
                    f"reads from lane {int(target.reshape(-1)[at])}, which does not take part",
                    at,
                )
        value = np.take_along_axis(m.spread(read_value(m)).reshape(shape), target, 1).reshape(-1)
        poison = m.poison_of(slots)
        if poison is not None:
            poison = np.take_along_axis(poison.reshape(shape), target, 1).reshape(-1)
        write(m, value, poison)
        if write_valid:
            write_valid(m, valid.reshape(-1), None)

    return shuffle


@opcode("vote")
def _vote(instr: Instr, program: Program, _: int) -> Step:
    if "sync" not in instr.mods:
        raise unsupported(instr)
    mode = instr.parts[2]
    dest, source, members = instr.operands
    write = program.writer(dest, U32 if mode == "ballot" else PRED)
    read, named, slots = (
        program.reader(source, PRED),
        program.reader(members, B32),
        program.slots_in(source),
    )

    def vote(m: Machine) -> None:
        mask = named(m)
        check_members(m, instr, mask)
        m.require_defined(instr, slots, "vote")
        here = np.repeat(ballot(m.mask), 32) & mask
        yes = np.repeat(ballot(m.spread(read(m)) & m.mask), 32) & here
        write(
            m,
            {
                "ballot": lambda: yes,
                "all": lambda: yes == here,
                "any": lambda: yes != 0,
                "uni": lambda: (yes == here) | (yes == 0),
            }[mode](),
            None,
        )

    return vote


@opcode("activemask")
def _activemask(instr: Instr, program: Program, _: int) -> Step:
    write = program.writer(instr.operands[0], U32)
    return lambda m: write(m, np.repeat(ballot(m.mask), 32), None)


@opcode("elect")
def _elect(instr: Instr, program: Program, _: int) -> Step:
    outputs, members = vector_of(instr.operands[0]), program.reader(instr.operands[1], B32)
    write_leader, write = program.writer(outputs[0], U32), program.writer(outputs[1], PRED)

    def elect(m: Machine) -> None:
        check_members(m, instr, members(m))
        leader = np.repeat(m.mask.reshape(-1, 32).argmax(axis=1), 32).astype(np.uint32)
        write_leader(m, leader, None)
        write(m, (m.lane_thread & 31) == leader, None)

    return elect


@opcode("redux")
def _redux(instr: Instr, program: Program, _: int) -> Step:
    kind, name = instr.type, instr.parts[2]
    dest, source, members = instr.operands
    read, named, write = (
        program.reader(source, kind),
        program.reader(members, B32),
        program.writer(dest, kind),
    )

    def reduce(m: Machine) -> None:
        check_members(m, instr, named(m))
        value, mask = m.spread(kind.decode(read(m))).reshape(-1, 32), m.mask.reshape(-1, 32)
        result = np.zeros(m.lanes, value.dtype).reshape(-1, 32)
        for warp in np.flatnonzero(mask.any(axis=1)):
            operate = ATOMIC[name]
            result[warp] = operate.reduce(value[warp][mask[warp]])
        write(m, kind.encode(result.reshape(-1)), m.poison_of(program.slots_in(source)))

    return reduce


@opcode("match")
def _match(instr: Instr, program: Program, _: int) -> Step:
    kind = instr.type
    outputs = vector_of(instr.operands[0])
    write = program.writer(outputs[0], U32)
    read, named = program.reader(instr.operands[1], kind), program.reader(instr.operands[2], B32)
    everyone = "all" in instr.mods

    def match(m: Machine) -> None:
        check_members(m, instr, named(m))
        value, mask = m.spread(read(m)).reshape(-1, 32), m.mask.reshape(-1, 32)
        same = (value[:, :, None] == value[:, None, :]) & mask[:, None, :]
        bits = (same * BITS).sum(axis=2).astype(np.uint32).reshape(-1)
        if everyone:
            agreed = bits == np.repeat(ballot(m.mask), 32)
            bits = np.where(agreed, bits, np.uint32(0))
            if len(outputs) > 1:
                program.writer(outputs[1], PRED)(m, agreed, None)
        write(m, bits, None)

    return match
