"""Order between the blocks of a launch, and races through global memory.

Blocks know nothing of each other but by a release and an acquire, of scope gpu or sys, of the same
address. What such a pair orders is kept as a clock for each warp of the launch: it goes from block
to block, and outlives the chunk of blocks that are simulated together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import RaceHazard

if TYPE_CHECKING:
    from .machine import Machine
    from .memory import Access, Allocation
    from .parser import Instr

Array = np.ndarray
NOBODY = -1
STRONG = frozenset({"acquire", "release", "acq_rel", "relaxed", "volatile"})
WIDE = frozenset({"gpu", "sys", "volatile"})


def is_strong(instr: Instr) -> bool:
    """Whether an access may meet another one of its kind at the same address and time."""
    return instr.op in ("atom", "red") or not instr.mods.isdisjoint(STRONG)


def reaches(instr: Instr) -> bool:
    """Whether other blocks are in an access's scope; an atomic without one has scope gpu."""
    narrow = instr.mods & {"cta", "cluster"}
    return not narrow if instr.op in ("atom", "red") else not instr.mods.isdisjoint(WIDE)


@dataclass
class Trace:
    """Of an allocation, by granule: the warp of the launch that was here last, and its clock."""

    warp: Array
    clock: Array
    strong: Array

    @classmethod
    def of(cls, count: int) -> Trace:
        return cls(
            np.full(count, NOBODY, np.int32), np.zeros(count, np.int32), np.zeros(count, bool)
        )


@dataclass
class Shadow:
    """Who wrote and, where blocks wait for one another, who read."""

    written: Trace
    read: Trace


class BlockOrder:
    """What blocks have told each other in one launch."""

    def __init__(self, blocks: int, warps: int, granule: int, waits: bool) -> None:
        """``waits``: whether any block may wait for another, so that reads, too, are remembered."""
        self.warps, self.granule, self.waits = warps, granule, waits
        self.total = blocks * warps
        self.released: dict[int, Array] = {}  # by address: what who reads its value then knows
        self.fenced: dict[int, Array] = {}  # by warp: what it knew at its last fence
        self.observed: dict[int, Array] = {}  # by warp: what a fence would let it know

    # --- releases, acquires, fences -------------------------------------------------------------
    def loaded(self, access: Access, addr: Array) -> None:
        """A strong load, or the load of an atomic: an acquire, or half of one until a fence."""
        mods = access.instr.mods
        if not self.released or not reaches(access.instr):
            return
        for lane, at in self._each(access, addr):
            told = self.released.get(at)
            if told is None:
                continue
            if mods.isdisjoint({"acquire", "acq_rel"}):
                warp = self._warp(access.machine, lane)
                self.observed[warp] = np.maximum(self.observed.get(warp, told), told)
            else:
                self._learn(access.machine, lane, told)

    def stored(self, access: Access, addr: Array) -> None:
        """Any store: a release, or relaxed behind a fence, or what ends the one before."""
        if not is_strong(access.instr) or not reaches(access.instr):
            if self.released:
                for at in np.intersect1d(addr, np.array(list(self.released), np.uint64)):
                    del self.released[int(at)]
            return
        atomic = access.instr.op in ("atom", "red")
        for lane, at in self._each(access, addr):
            if access.instr.mods.isdisjoint({"release", "acq_rel"}):
                told = self.fenced.get(self._warp(access.machine, lane))
            else:
                told = self._know(access.machine, lane)
            before = self.released.pop(at, None) if atomic else None
            both = [clock for clock in (told, before) if clock is not None]
            if both:
                self.released[at] = np.maximum.reduce(both)
            elif not atomic:
                self.released.pop(at, None)

    def fence(self, machine: Machine) -> None:
        """``fence.acq_rel`` or ``fence.sc``, ``membar``, of scope gpu or sys."""
        lanes = machine.active
        warps = machine.ctaid[lanes] * self.warps + machine.lane_warp[lanes]
        for at in np.unique(warps, return_index=True)[1]:
            lane, warp = int(lanes[at]), int(warps[at])
            told = self.observed.pop(warp, None)
            if told is not None:
                self._learn(machine, lane, told)
            self.fenced[warp] = self._know(machine, lane)

    def _each(self, access: Access, addr: Array) -> set[tuple[int, int]]:
        """(a lane of each warp, address)."""
        leaders = access.lanes // 32 * 32
        return set(zip(leaders.tolist(), addr.tolist(), strict=True))

    def _warp(self, machine: Machine, lane: int) -> int:
        return int(machine.ctaid[lane]) * self.warps + int(machine.lane_warp[lane])

    def _know(self, machine: Machine, lane: int) -> Array:
        """All that happens before what this warp does from now on."""
        block, warp = machine.lane_block[lane], machine.lane_warp[lane]
        own = machine.clocks.release(block[None], warp[None])[0]
        far = machine.clocks.far
        known = np.zeros(self.total, np.int32) if far is None else far[block, warp].copy()
        first = int(machine.ctaid[lane]) * self.warps
        known[first : first + self.warps] = own
        return known

    def _learn(self, machine: Machine, lane: int, told: Array) -> None:
        clocks = machine.clocks
        if clocks.far is None:
            clocks.far = np.zeros((machine.blocks, self.warps, self.total), np.int32)
        place = machine.lane_block[lane], machine.lane_warp[lane]
        clocks.far[place] = np.maximum(clocks.far[place], told)

    # --- races ----------------------------------------------------------------------------------
    def check_read(
        self, access: Access, found: Allocation, lanes: Array, offset: Array, nbytes: int
    ) -> None:
        if found.readonly or (found.shadow is None and not self.waits):
            return
        cells, shadow = self._cells(offset, nbytes), self._shadow(found)
        nothing = np.zeros(lanes.size, bool)
        self._check(access, found, lanes, cells, nothing, (shadow.written, "reads", "wrote"))
        if self.waits:
            self._remember(access, shadow.read, lanes, cells)

    def check_write(
        self,
        access: Access,
        found: Allocation,
        lanes: Array,
        offset: Array,
        nbytes: int,
        same: Array,
    ) -> None:
        """``same``: lanes that write what is there already, which is no race."""
        cells, shadow = self._cells(offset, nbytes), self._shadow(found)
        self._check(access, found, lanes, cells, same, (shadow.written, "writes", "wrote"))
        self._check(access, found, lanes, cells, same, (shadow.read, "writes", "read"))
        self._remember(access, shadow.written, lanes, cells)

    def _shadow(self, found: Allocation) -> Shadow:
        if found.shadow is None:
            count = found.data.size // self.granule + 1
            found.shadow = Shadow(Trace.of(count), Trace.of(count if self.waits else 0))
        return found.shadow

    def _cells(self, offset: Array, nbytes: int) -> Array:
        first = offset // self.granule
        return first[:, None] + np.arange(max(nbytes // self.granule, 1))

    def _remember(self, access: Access, trace: Trace, lanes: Array, cells: Array) -> None:
        machine = access.machine
        block, warp = machine.lane_block[lanes], machine.lane_warp[lanes]
        trace.warp[cells] = (machine.ctaid[lanes] * self.warps + warp)[:, None]
        trace.clock[cells] = machine.clocks.own(block, warp)[:, None]
        trace.strong[cells] = is_strong(access.instr)

    def _check(
        self,
        access: Access,
        found: Allocation,
        lanes: Array,
        cells: Array,
        same: Array,
        met: tuple[Trace, str, str],
    ) -> None:
        trace, verb, past = met
        if trace.warp.size == 0:
            return
        machine, other = access.machine, trace.warp[cells]
        bad = (other >= 0) & (other // self.warps != machine.ctaid[lanes][:, None])
        bad &= ~same[:, None]
        if is_strong(access.instr):
            bad &= ~trace.strong[cells]
        if not bad.any():
            return
        far = machine.clocks.far
        if far is not None:
            block, warp = machine.lane_block[lanes], machine.lane_warp[lanes]
            bad &= trace.clock[cells] >= far[block[:, None], warp[:, None], np.maximum(other, 0)]
        if bad.any():
            at, which = (int(v) for v in np.unravel_index(int(bad.argmax()), bad.shape))
            place = int(cells[at, which]) * self.granule
            name = machine.block_name(int(other[at, which]) // self.warps)
            text = f"{verb} {found.name}, byte {place}, which {name} {past}, in no order"
            machine.fail(RaceHazard, access.instr, text, int(lanes[at]))
