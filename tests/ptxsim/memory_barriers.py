"""mbarrier: barriers in shared memory that count arrivals and the bytes of bulk copies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .alu import unsupported
from .dtypes import Array
from .errors import BarrierError, UninitialisedRead
from .machine import Machine, Step
from .memory import SHARED_BASE, Access
from .operands import PRED, U32, memory_address, opcode, space_of
from .parser import Instr
from .program import Program


@dataclass
class MemoryBarrier:
    """The current phase's open arrivals and bytes; what its waiters then know has happened."""

    count: int
    arrivals: int
    clock: Array
    released: Array = field(init=False)
    nbytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.released = self.clock.copy()

    def step(self, m: Machine) -> None:
        """End the phase if nothing is open."""
        if self.arrivals == 0 and self.nbytes == 0:
            self.phase += 1
            self.arrivals, self.released = self.count, self.clock.copy()
            m.wake()


Barriers = dict[tuple[int, int], MemoryBarrier]
"""By block of the chunk and address."""


def barrier_at(m: Machine, instr: Instr, lane: int, address: int) -> MemoryBarrier:
    found = m.memory_barriers.get((int(m.lane_block[lane]), address))
    if found is None:
        m.fail(UninitialisedRead, instr, "there is no mbarrier.init at this address", lane)
    return found


def complete_bytes(m: Machine, barrier: MemoryBarrier, nbytes: int, clock: Array) -> None:
    """A bulk copy has arrived; who waits for the barrier knows what its issuer knew."""
    barrier.clock = np.maximum(barrier.clock, clock)
    barrier.nbytes -= nbytes
    barrier.step(m)


@opcode("mbarrier")
def _mbarrier(instr: Instr, program: Program, block: int) -> Step:
    action = instr.parts[1]
    waits = action in ("try_wait", "test_wait")
    known = ("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait")
    unknown = action not in known or (waits and "parity" not in instr.mods)
    if unknown or (instr.guard is not None and waits) or "noComplete" in instr.mods:
        raise unsupported(instr)
    target = instr.operands[1 if waits or action == "arrive" else 0]
    extra = instr.operands[2 if waits or action == "arrive" else 1 :]
    read_extra = program.reader(extra[0], U32) if extra else None
    addresses, _slots = memory_address(instr, program, target)
    generic = space_of(instr) == "generic"

    def place(m: Machine) -> tuple[Access, Array, list[int]]:
        addr = addresses(m)
        addr = addr - np.uint64(SHARED_BASE) if generic else addr
        values = [1] * addr.size
        if read_extra is not None:
            values = m.spread(read_extra(m))[m.active].tolist()
        return Access(m, instr, m.active), addr, values

    def init(m: Machine) -> None:
        access, addr, counts = place(m)
        m.shared.store(access, addr, np.zeros((1, addr.size), np.uint64))
        for lane, at, count in zip(access.lanes, addr, counts, strict=True):
            clock = np.full(m.warps, -1, np.int32)
            key = int(m.lane_block[lane]), int(at)
            m.memory_barriers[key] = MemoryBarrier(count, count, clock)

    def invalidate(m: Machine) -> None:
        access, addr, _ = place(m)
        for lane, at in zip(access.lanes, addr, strict=True):
            m.memory_barriers.pop((int(m.lane_block[lane]), int(at)), None)

    def arrive(m: Machine) -> None:
        access, addr, values = place(m)
        m.shared.load(access, addr, np.dtype(np.uint64), 1)
        clocks = m.clocks.release(m.lane_block[access.lanes], m.lane_warp[access.lanes])
        expects = "expect_tx" in instr.mods
        for k, (lane, at) in enumerate(zip(access.lanes, addr, strict=True)):
            barrier = barrier_at(m, instr, int(lane), int(at))
            barrier.nbytes += values[k] if expects else 0
            if action == "arrive":
                count = 1 if expects else values[k]
                if count > barrier.arrivals:
                    text = f"more arrivals than the {barrier.count} of this mbarrier's phase"
                    m.fail(BarrierError, instr, text, int(lane))
                barrier.arrivals -= count
                barrier.clock = np.maximum(barrier.clock, clocks[k])
            barrier.step(m)

    if waits:
        write = program.writer(instr.operands[0], PRED)

    def wait(m: Machine) -> None:
        """A try_wait sleeps until its phase is over: the time limit that it may have never runs
        out."""
        access, addr, parities = place(m)
        m.shared.load(access, addr, np.dtype(np.uint64), 1)
        over = np.zeros(m.lanes, bool)
        keys = np.stack([m.lane_block[access.lanes], addr.astype(np.int64), np.array(parities)])
        for where in np.unique(keys, axis=1).T:
            lanes = access.lanes[(keys == where[:, None]).all(axis=0)]
            barrier = barrier_at(m, instr, int(lanes[0]), int(where[1]))
            if barrier.phase % 2 != where[2] % 2:
                over[lanes] = True
                m.clocks.acquire(int(where[0]), np.unique(m.lane_warp[lanes]), barrier.released)
        if action == "test_wait":
            write(m, over, None)
            m.go(block + 1, m.mask)
            return
        if over.any():
            with m.only(over):
                write(m, np.ones(1, bool), None)
            m.go(block + 1, over)
        waiting = m.mask & ~over
        if waiting.any():
            m.sleep(block, waiting)

    steps = {"init": init, "inval": invalidate, "arrive": arrive, "expect_tx": arrive}
    return steps.get(action, wait)
