"""Control flow, barriers, and the glue for the ALU table."""

from __future__ import annotations

import numpy as np

from .alu import ALU, unsupported
from .dtypes import Array, bit_type
from .errors import Trap
from .machine import Machine, Step
from .memory import LOCAL_BASE, SHARED_BASE
from .operands import OPCODES, PRED, SPACES, U32, U64, check_members, opcode
from .parser import Instr, Operand, Vec
from .program import Program


def compile_instruction(instr: Instr, program: Program, block: int) -> Step:
    """Compile one instruction, its guard included."""
    compiler = OPCODES.get(instr.op) or (_compile_alu if instr.op in ALU else None)
    if compiler is None:
        raise unsupported(instr)
    step = compiler(instr, program, block)
    if instr.guard is None or instr.op in ("bra", "ret", "exit"):
        return step
    condition, slots = program.reader(instr.guard, PRED), program.slots_in(instr.guard)

    def guarded(m: Machine) -> None:
        m.require_defined(instr, slots, "guard predicate")
        chosen = condition(m) & m.mask
        if not chosen.any():
            return
        if bool((chosen == m.mask).all()):
            step(m)
        else:
            with m.only(chosen):
                step(m)

    return guarded


def _compile_alu(instr: Instr, program: Program, _: int) -> Step:
    semantics = ALU[instr.op](instr)
    dest, sources, fn = semantics.dest, semantics.sources, semantics.fn
    operands = instr.operands[1 : 1 + len(sources)]
    readers = [program.reader(o, t) for o, t in zip(operands, sources, strict=True)]
    decoders = [t.decode for t in sources]
    slots = program.slots_in(*operands)
    pair = instr.operands[0].items if isinstance(instr.operands[0], Vec) else None
    writers = [program.writer(o, dest) for o in (pair or instr.operands[:1])]
    encode = dest.encode
    pairs = list(zip(readers, decoders, strict=True))
    two = instr.op == "setp"
    chooses = instr.op == "selp"
    takes_low = instr.op == "cvt" and [t.bits for t in instr.types] == [32, 64] and bool(slots)

    def run(m: Machine) -> None:
        values = [
            decode(read(m)) for read, decode in pairs
        ]  # reading first marks unwritten registers
        poison = m.poison_of(slots) if m.undefined else None
        if poison is not None and takes_low and slots[0] in m.low_half:
            poison = m.low_half[slots[0]]
        if poison is not None and chooses:
            poison = _select_poison(m, program, operands, values[2])
        result = fn(*values)
        if two:
            for write, value in zip(writers, result, strict=False):
                write(m, value, poison)
        else:
            writers[0](m, encode(result), poison)

    return run


def _select_poison(
    m: Machine, program: Program, operands: tuple[Operand, ...], choice: Array
) -> Array | None:
    """selp: only the chosen operand (and the predicate) matters."""
    none = np.zeros(m.lanes, bool)
    first, second, chooser = (
        p if (p := m.poison_of(program.slots_in(o))) is not None else none for o in operands
    )
    poison = chooser | np.where(choice, first, second)
    return poison if poison.any() else None


@opcode("mov")
def _mov(instr: Instr, program: Program, _: int) -> Step:
    dest, source = instr.operands
    kind = instr.type
    slots = program.slots_in(source)
    if isinstance(dest, Vec):
        part = bit_type(kind.bits // len(dest.items))
        read = program.reader(source, kind)
        writers = [program.writer(d, part) for d in dest.items]

        def unpack(m: Machine) -> None:
            pieces = np.ascontiguousarray(read(m)).view(part.raw).reshape(-1, len(writers))
            for k, write in enumerate(writers):
                write(m, np.ascontiguousarray(pieces[:, k]), m.poison_of(slots))

        return unpack
    write = program.writer(dest, bit_type(kind.bits))
    if isinstance(source, Vec):
        part = bit_type(kind.bits // len(source.items))
        readers = [program.reader(s, part) for s in source.items]
        packed = program.slot_of[dest.name]

        def pack(m: Machine) -> None:
            pieces = np.stack(np.broadcast_arrays(*[r(m) for r in readers]), axis=-1)
            poison = m.poison_of(slots)
            write(m, np.ascontiguousarray(pieces).view(kind.raw).reshape(-1), poison)
            if poison is not None and m.full:  # nvcc packs one number and takes it out again
                m.low_half[packed] = m.poison_of(program.slots_in(source.items[0]))

        return pack
    read = program.reader(source, kind)
    target = program.slots_in(dest)

    def move(m: Machine) -> None:
        write(m, read(m), m.poison_of(slots))
        if m.under_way and slots:
            m.carry(target[0], slots[0])

    return move


@opcode("cvta")
def _cvta(instr: Instr, program: Program, _: int) -> Step:
    space = next((s for s in SPACES if s in instr.mods), "global")
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
    base = -base if "to" in instr.mods else base
    read, write = program.reader(instr.operands[1], U64), program.writer(instr.operands[0], U64)
    slots = program.slots_in(instr.operands[1])
    offset = np.array([base & (2**64 - 1)], np.uint64)
    return lambda m: write(m, read(m) + offset if base else read(m), m.poison_of(slots))


@opcode("isspacep")
def _isspacep(instr: Instr, program: Program, _: int) -> Step:
    read, write = program.reader(instr.operands[1], U64), program.writer(instr.operands[0], PRED)
    space = instr.parts[1]
    low, high = {
        "shared": (SHARED_BASE, LOCAL_BASE),
        "local": (LOCAL_BASE, 2 * LOCAL_BASE),
        "global": (2 * LOCAL_BASE, 2**63),
    }.get(space, (1, 0))
    return lambda m: write(m, (read(m) >= np.uint64(low)) & (read(m) < np.uint64(high)), None)


@opcode("fence")
def _fence(instr: Instr, program: Program, _: int) -> Step:
    if not instr.mods.isdisjoint({"acq_rel", "sc"}):
        return _membar(instr, program, _)
    if instr.mods.isdisjoint({"async", "mbarrier_init"}) or "global" in instr.mods:
        return _nothing(instr, program, _)
    return lambda m: m.clocks.fence(m.lane_block[m.active], m.lane_warp[m.active])


@opcode("membar")
def _membar(instr: Instr, program: Program, _: int) -> Step:
    """Of a block's own scope it adds nothing: the race checks ask for barriers there."""
    if instr.mods.isdisjoint({"gl", "gpu", "sys"}):
        return _nothing(instr, program, _)

    def fence(m: Machine) -> None:
        if m.memory.order:
            m.memory.order.fence(m)

    return fence


@opcode(
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "nanosleep",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
)
def _nothing(instr: Instr, program: Program, _: int) -> Step:
    return lambda m: None


@opcode("createpolicy")
def _create_policy(instr: Instr, program: Program, _: int) -> Step:
    write = program.writer(instr.operands[0], U64)
    return lambda m: write(m, np.zeros(1, np.uint64), None)


@opcode("bra")
def _bra(instr: Instr, program: Program, block: int) -> Step:
    target = program.block_of[instr.operands[0].name]
    if instr.guard is None:
        return lambda m: m.go(target, m.mask)
    condition, slots, following = (
        program.reader(instr.guard, PRED),
        program.slots_in(instr.guard),
        block + 1,
    )

    def branch(m: Machine) -> None:
        m.require_defined(instr, slots, "branch condition")
        taken = condition(m) & m.mask
        count = int(taken.sum())
        if count == 0:
            m.go(following, m.mask)
        elif count == m.active.size:
            m.go(target, m.mask)
        else:
            m.go(target, taken)
            m.go(following, m.mask & ~taken)

    return branch


@opcode("ret", "exit")
def _exit(instr: Instr, program: Program, block: int) -> Step:
    if instr.guard is None:
        return lambda m: m.retire(m.mask)
    condition = program.reader(instr.guard, PRED)

    def leave(m: Machine) -> None:
        gone = condition(m) & m.mask
        stay = m.mask & ~gone
        if gone.any():
            m.retire(gone)
        if stay.any():
            m.go(block + 1, stay)

    return leave


@opcode("trap")
def _trap(instr: Instr, program: Program, _: int) -> Step:
    return lambda m: m.fail(Trap, instr, "trap executed", int(m.active[0]))


@opcode("bar", "barrier")
def _barrier(instr: Instr, program: Program, block: int) -> Step:
    if "warp" in instr.mods:
        members = program.reader(instr.operands[0], U32)

        def warp_barrier(m: Machine) -> None:
            check_members(m, instr, members(m))
            m.clocks.warp_sync(m.mask.reshape(m.blocks, m.warps, 32).any(axis=2))
            m.go(block + 1, m.mask)

        return warp_barrier
    if "red" in instr.mods:
        raise unsupported(instr)
    readers = [program.reader(o, U32) for o in instr.operands]
    wait = "arrive" not in instr.mods

    def barrier(m: Machine) -> None:
        number, *count = (int(m.spread(r(m))[m.active[0]]) for r in readers)
        m.arrive(number, m.mask, block + 1, count[0] if count else None, wait)

    return barrier
