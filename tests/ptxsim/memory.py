"""Memory spaces: bounds, alignment, initialisation and race checks.

Generic addresses are split into windows: shared at ``SHARED_BASE``, thread-local at
``LOCAL_BASE``, and global allocations (NumPy buffers, used in place) from ``GLOBAL_BASE`` up,
with unmapped gaps between them.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .block_order import BlockOrder, Shadow, is_strong
from .errors import (
    AsyncCopyHazard,
    KernelFault,
    Misaligned,
    OutOfBounds,
    RaceHazard,
    ReadOnlyWrite,
    UninitialisedRead,
)

if TYPE_CHECKING:
    from .machine import Machine
    from .parser import Instr

Array = np.ndarray
SHARED_BASE, LOCAL_BASE, GLOBAL_BASE = 1 << 40, 1 << 41, 0x7000_0000_0000
PARAM_START = 1 << 16  # address of the first parameter byte, in a space of their own
SHARED_START = 1024  # offset of the first shared byte in its window; address 0 stays invalid
GAP = 1 << 20


@dataclass
class Access:
    """One executed memory instruction: who does it, and how to report a fault."""

    machine: Machine
    instr: Instr
    lanes: Array  # active lanes of the chunk

    def fail(self, kind: type[KernelFault], position: int, text: str) -> NoReturn:
        self.machine.fail(kind, self.instr, text, int(self.lanes[position]))

    def check_aligned(self, addr: Array, nbytes: int) -> None:
        bad = (addr & (nbytes - 1)) != 0 if nbytes > 1 else None
        if bad is not None and bad.any():
            at = int(bad.argmax())
            self.fail(Misaligned, at, f"address {int(addr[at]):#x} is not a multiple of {nbytes}")


@dataclass
class Allocation:
    """A registered global buffer."""

    base: int
    data: Array
    name: str
    readonly: bool
    shadow: Shadow | None = None  # who was here, where races are looked for

    @property
    def end(self) -> int:
        return self.base + self.data.size

    def typed(self, dtype: np.dtype) -> Array:
        size = dtype.itemsize
        return self.data[: self.data.size // size * size].view(dtype)


class GlobalMemory:
    """All global and constant allocations of a launch; ``order`` checks for races, if given."""

    def __init__(self, order: BlockOrder | None = None) -> None:
        self.order = order
        self.allocations: list[Allocation] = []
        self.bases: list[int] = []
        self.next_base = GLOBAL_BASE

    def add(self, data: Array, name: str, readonly: bool = False, skew: int = 0) -> int:
        """Register a byte buffer; ``skew`` keeps the host address's low bits (alignment)."""
        base = self.next_base + skew
        self.allocations.append(Allocation(base, data, name, readonly))
        self.bases.append(base)
        self.next_base = (base + data.size + 2 * GAP) // GAP * GAP
        return base

    def add_at(self, base: int, data: Array, name: str) -> None:
        """Register a byte buffer at an address of its own, which no other one may reach."""
        self.allocations.append(Allocation(base, data, name, not data.flags.writeable))
        self.allocations.sort(key=lambda allocation: allocation.base)
        insort(self.bases, base)

    def _split(
        self, access: Access, addr: Array, nbytes: int
    ) -> list[tuple[Allocation, Array, Array | slice]]:
        """Group addresses by allocation: (allocation, byte offsets, positions)."""
        low, high = int(addr.min()), int(addr.max())
        at = bisect_right(self.bases, low) - 1
        if at >= 0 and high + nbytes <= self.allocations[at].end:
            found = self.allocations[at]
            return [(found, (addr - np.uint64(found.base)).astype(np.int64), slice(None))]
        groups = []
        index = np.searchsorted(np.array(self.bases, np.uint64), addr, "right").astype(np.int64) - 1
        for which in np.unique(index):
            where = np.flatnonzero(index == which)
            found = self.allocations[which] if which >= 0 else None
            bad = addr[where] + np.uint64(nbytes) > np.uint64(found.end if found else 0)
            if bad.any():
                position = int(where[bad.argmax()])
                self._out_of_bounds(access, position, int(addr[position]), nbytes, found)
            groups.append((found, (addr[where] - np.uint64(found.base)).astype(np.int64), where))
        return groups

    @staticmethod
    def _out_of_bounds(
        access: Access, position: int, addr: int, nbytes: int, below: Allocation | None
    ) -> NoReturn:
        if below is None:
            near = "below every allocation" + (" (null pointer?)" if addr < 4096 else "")
        else:
            near = f"{addr - below.base} bytes into {below.name} of {below.data.size} bytes"
        access.fail(OutOfBounds, position, f"{nbytes}-byte global access at {addr:#x}: {near}")

    def load(self, access: Access, addr: Array, dtype: np.dtype, vector: int) -> Array:
        """Gather ``vector`` elements per lane; shape (vector, lanes)."""
        access.check_aligned(addr, dtype.itemsize * vector)
        return self.load_unaligned(access, addr, dtype, vector)

    def load_unaligned(self, access: Access, addr: Array, dtype: np.dtype, vector: int) -> Array:
        """Like ``load``, for vectors that need only their elements' alignment."""
        nbytes = dtype.itemsize * vector
        result = np.empty((vector, addr.size), dtype)
        for found, offset, where in self._split(access, addr, nbytes):
            if self.order:
                self.order.check_read(access, found, access.lanes[where], offset, nbytes)
            index = offset // dtype.itemsize
            view = found.typed(dtype)
            for i in range(vector):
                result[i, where] = view[index + i]
        if self.order and is_strong(access.instr):
            self.order.loaded(access, addr)
        return result

    def store(self, access: Access, addr: Array, values: Array) -> None:
        """Scatter ``values`` of shape (vector, lanes)."""
        vector, dtype = values.shape[0], values.dtype
        nbytes = dtype.itemsize * vector
        access.check_aligned(addr, nbytes)
        for found, offset, where in self._split(access, addr, nbytes):
            self._writable(access, found)
            index = offset // dtype.itemsize
            view = found.typed(dtype)
            if self.order:
                same = [view[index + i] == values[i, where] for i in range(vector)]
                lanes, kept = access.lanes[where], np.logical_and.reduce(same)
                self.order.check_write(access, found, lanes, offset, nbytes, kept)
            for i in range(vector):
                view[index + i] = values[i, where]
            if self.order:
                lost = np.logical_or.reduce(
                    [view[index + i] != values[i, where] for i in range(vector)]
                )
                if lost.any():
                    text = f"threads of one store write different values to {found.name}"
                    at = int(np.arange(addr.size)[where][lost.argmax()])
                    access.fail(RaceHazard, at, text)
        if self.order:
            self.order.stored(access, addr)
        access.machine.wake()

    def atomic(
        self, access: Access, addr: Array, operands: list[Array], update: Callable[..., Array]
    ) -> Array:
        """Apply ``new = update(old, *operands)`` lane by lane; returns the old values."""
        dtype = operands[0].dtype
        access.check_aligned(addr, dtype.itemsize)
        old = np.empty(addr.size, dtype)
        for found, offset, where in self._split(access, addr, dtype.itemsize):
            self._writable(access, found)
            if self.order:
                lanes, changes = access.lanes[where], np.zeros(offset.size, bool)
                self.order.check_write(access, found, lanes, offset, dtype.itemsize, changes)
            old[where] = atomic_update(
                found.typed(dtype), offset // dtype.itemsize, [o[where] for o in operands], update
            )
        if self.order:
            self.order.loaded(access, addr)
            self.order.stored(access, addr)
        access.machine.wake()
        return old

    @staticmethod
    def _writable(access: Access, found: Allocation) -> None:
        if found.readonly:
            access.fail(ReadOnlyWrite, 0, f"store to read-only {found.name}")


def atomic_update(
    view: Array, index: Array, operands: list[Array], update: Callable[..., Array]
) -> Array:
    """Serialise updates of equal indices in lane order, vectorised over different ones."""
    old = np.empty(index.size, view.dtype)
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    position = np.arange(index.size)
    rank = position - np.maximum.accumulate(np.where(first, position, 0))
    for step in range(int(rank.max()) + 1):
        lanes = order[rank == step]
        old[lanes] = view[index[lanes]]
        view[index[lanes]] = update(old[lanes], *[o[lanes] for o in operands])
    return old


class Clocks:
    """Vector clocks of the warps of each block: who has synchronised with whom.

    An access by warp ``v`` at its clock ``c`` happens before warp ``w``'s next access
    iff ``now[block, w, v] > c``.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.now = np.zeros((blocks, warps, warps), np.int32)
        self.fenced = np.full((blocks, warps, warps), -1, np.int32)
        self.far: Array | None = None  # the same of all warps of the launch; block_order.py
        self.diagonal = np.arange(warps)

    def own(self, block: Array, warp: Array) -> Array:
        return self.now[block, warp, warp]

    def barrier(self, members: Array) -> None:
        """Join the clocks of each block's member warps; ``members`` is (blocks, warps) bool."""
        self.now[:, self.diagonal, self.diagonal] += members
        self.now = self._joined(self.now, members)
        if self.far is not None:
            self.far = self._joined(self.far, members)

    @staticmethod
    def _joined(clocks: Array, members: Array) -> Array:
        joined = np.where(members[:, :, None], clocks, -1).max(axis=1)
        return np.where(members[:, :, None], joined[:, None, :], clocks)

    def release(self, blocks: Array, warps: Array) -> Array:
        """What each of these warps has done so far, for others to acquire; (warps, all warps)."""
        for block, warp in np.unique(np.stack([blocks, warps]), axis=1).T:
            self.now[block, warp, warp] += 1
        return self.now[blocks, warps]

    def acquire(self, block: int, warps: Array, clock: Array) -> None:
        self.now[block, warps] = np.maximum(self.now[block, warps], clock)

    def fence(self, blocks: Array, warps: Array) -> None:
        """``fence.proxy.async``: what these warps know of so far, copies and wgmma see."""
        self.release(blocks, warps)
        self.fenced[blocks, warps] = self.now[blocks, warps]

    def warp_sync(self, members: Array) -> None:
        """``bar.warp.sync``: orders the threads of a warp among themselves."""
        self.now[:, self.diagonal, self.diagonal] += members


NOBODY, MANY = -1, -2


class SharedMemory:
    """The shared memory of all blocks of a chunk, with shadow state per granule of bytes."""

    def __init__(
        self, blocks: int, size: int, granule: int, clocks: Clocks, check_races: bool
    ) -> None:
        self.size, self.granule, self.clocks, self.check_races = size, granule, clocks, check_races
        self.stride = -(-max(size, 16) // 128) * 128
        self.bytes = np.full(blocks * self.stride, 0xCD, np.uint8)
        count = self.bytes.size // granule
        self.written = np.zeros(count, bool)
        self.in_flight = np.zeros(count, bool)
        self.any_in_flight = False
        self.being_read = np.zeros(count, np.int16)  # by how many pieces of products under way
        self.by_thread = np.zeros(count, bool)  # written by a thread, not by a bulk copy
        if check_races:
            warps = clocks.now.shape[1]
            self.writer = np.full(count, NOBODY, np.int32)
            self.writer_atomic = np.zeros(count, bool)
            self.write_clock = np.zeros(count, np.int32)
            self.reader = np.full((count, warps), NOBODY, np.int32)
            self.read_clock = np.full((count, warps), -1, np.int32)

    # --- addressing -----------------------------------------------------------------------------
    def _offsets(self, access: Access, addr: Array, nbytes: int) -> Array:
        access.check_aligned(addr, nbytes)
        offset = addr.astype(np.int64) - SHARED_START
        bad = (offset < 0) | (offset + nbytes > self.size)
        if bad.any():
            at = int(bad.argmax())
            access.fail(
                OutOfBounds,
                at,
                f"{nbytes}-byte shared access at offset {int(offset[at])} of {self.size} bytes",
            )
        return offset + access.machine.lane_block[access.lanes] * self.stride

    def _granules(self, offset: Array, nbytes: int) -> Array:
        first = offset // self.granule
        count = max(nbytes // self.granule, 1)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    # --- operations -----------------------------------------------------------------------------
    def load(
        self, access: Access, addr: Array, dtype: np.dtype, vector: int
    ) -> tuple[Array, Array | None]:
        """Gather (vector, lanes) values and, per lane, whether any byte is uninitialised."""
        nbytes = dtype.itemsize * vector
        offset = self._offsets(access, addr, nbytes)
        cells = self._granules(offset, nbytes)
        self._check_read(access, cells)
        written = self.written[cells]
        undefined = None if written.all() else ~written.all(axis=1)
        view, index = self.bytes.view(dtype), offset // dtype.itemsize
        return np.stack([view[index + i] for i in range(vector)]), undefined

    def store(
        self, access: Access, addr: Array, values: Array, undefined: Array | None = None
    ) -> None:
        """Scatter (vector, lanes) values; of lanes marked ``undefined`` bytes stay so."""
        vector, dtype = values.shape[0], values.dtype
        nbytes = dtype.itemsize * vector
        offset = self._offsets(access, addr, nbytes)
        cells = self._granules(offset, nbytes)
        view, index = self.bytes.view(dtype), offset // dtype.itemsize
        if self.check_races or self.any_in_flight:
            same = np.logical_and.reduce([view[index + i] == values[i] for i in range(vector)])
            self._check_write(access, cells, same)
        for i in range(vector):
            view[index + i] = values[i]
        if self.check_races:
            clash = np.logical_or.reduce([view[index + i] != values[i] for i in range(vector)])
            if clash.any():
                access.fail(
                    RaceHazard,
                    int(clash.argmax()),
                    "threads of one store write different values to the "
                    f"same shared bytes (offset {int(addr[clash.argmax()]) - SHARED_START})",
                )
        self.written[cells] = True if undefined is None else ~undefined[:, None]
        self.by_thread[cells] = True

    def atomic(
        self, access: Access, addr: Array, operands: list[Array], update: Callable[..., Array]
    ) -> Array:
        dtype = operands[0].dtype
        offset = self._offsets(access, addr, dtype.itemsize)
        cells = self._granules(offset, dtype.itemsize)
        if not self.written[cells].all():
            access.fail(
                UninitialisedRead,
                int((~self.written[cells]).any(axis=1).argmax()),
                "atomic on uninitialised shared memory",
            )
        self._check_write(access, cells, np.zeros(addr.size, bool), atomic=True)
        return atomic_update(self.bytes.view(dtype), offset // dtype.itemsize, operands, update)

    # --- asynchronous copies --------------------------------------------------------------------
    def begin_copy(self, access: Access, addr: Array, nbytes: int, bulk: bool = False) -> None:
        """Mark the destination of a cp.async as in flight."""
        cells = self._granules(self._offsets(access, addr, nbytes), nbytes)
        if bulk:
            self._check_fenced(access, cells)
            self.by_thread[cells] = False
        self._check_write(access, cells, np.zeros(addr.size, bool))
        self.in_flight[cells] = self.any_in_flight = True

    def finish_copy(self, access: Access, addr: Array, values: Array) -> None:
        """Deliver a cp.async (at the wait): bytes become visible to the waiting thread."""
        cells = self._granules(
            self._offsets(access, addr, values.shape[0] * values.dtype.itemsize),
            values.shape[0] * values.dtype.itemsize,
        )
        self.in_flight[cells] = False
        self.any_in_flight = bool(self.in_flight.any())
        self.store(access, addr, values)

    def land(self, access: Access, addr: Array, values: Array) -> None:
        """Deliver a bulk copy, whose barrier makes it known."""
        nbytes = values.shape[0] * values.dtype.itemsize
        offset = self._offsets(access, addr, nbytes)
        cells = self._granules(offset, nbytes)
        view, index = self.bytes.view(values.dtype), offset // values.dtype.itemsize
        for i, value in enumerate(values):
            view[index + i] = value
        self.in_flight[cells], self.written[cells] = False, True
        self.any_in_flight = bool(self.in_flight.any())

    # --- reads by products, which threads wait for ---------------------------------------------
    def begin_read(
        self, access: Access, addr: Array, dtype: np.dtype, vector: int
    ) -> tuple[Array, Array | None, Array]:
        """Like ``load``; the cells, too, stay in use until ``end_read``."""
        nbytes = dtype.itemsize * vector
        offset = self._offsets(access, addr, nbytes)
        cells = self._granules(offset, nbytes)
        self._check_written(access, cells)
        self._check_fenced(access, cells)
        np.add.at(self.being_read, cells, 1)
        written = self.written[cells]
        view, index = self.bytes.view(dtype), offset // dtype.itemsize
        values = np.stack([view[index + i] for i in range(vector)])
        return values, None if written.all() else ~written.all(axis=1), cells

    def end_read(self, access: Access, cells: Array) -> None:
        np.subtract.at(self.being_read, cells, 1)
        if cells.size and self.check_races:
            self._remember_read(access, cells)

    def check_fenced(self, access: Access, addr: Array, nbytes: int) -> None:
        """What a thread wrote there a bulk copy may use only behind a ``fence.proxy.async``."""
        self._check_fenced(access, self._granules(self._offsets(access, addr, nbytes), nbytes))

    # --- checks ---------------------------------------------------------------------------------
    def _identity(self, access: Access) -> tuple[Array, Array, Array]:
        machine, lanes = access.machine, access.lanes
        return (
            machine.lane_block[lanes][:, None],
            machine.lane_warp[lanes][:, None],
            machine.lane_thread[lanes][:, None],
        )

    def _fail_race(
        self, access: Access, bad: Array, other: Array, verb: str, past: str, cells: Array
    ) -> NoReturn:
        lane, which = (int(v) for v in np.unravel_index(int(bad.argmax()), bad.shape))
        offset = int(cells[lane, which]) * self.granule % self.stride
        by = (
            "several threads of a warp"
            if other[lane, which] == MANY
            else f"thread {int(other[lane, which])}"
        )
        access.fail(
            RaceHazard,
            lane,
            f"{verb} shared offset {offset}, {past} by {by} with no barrier in between",
        )

    def _check_flight(self, access: Access, cells: Array) -> None:
        if self.any_in_flight:
            flying = self.in_flight[cells].any(axis=1)
            if flying.any():
                access.fail(
                    AsyncCopyHazard,
                    int(flying.argmax()),
                    "shared bytes whose asynchronous copy has not been waited for",
                )

    def _check_fenced(self, access: Access, cells: Array) -> None:
        """Either the writer's fence or this thread's own stands between."""
        if not self.check_races or not self.by_thread[cells].any():
            return
        block, warp, _ = self._identity(access)
        writer, clock = np.maximum(self.writer[cells], 0) >> 5, self.write_clock[cells]
        own = self.clocks.fenced[block, warp, writer] > clock
        bad = self.by_thread[cells] & ~own & ~(self.clocks.fenced[block, writer, writer] > clock)
        if bad.any():
            lane, which = (int(v) for v in np.unravel_index(int(bad.argmax()), bad.shape))
            offset = int(cells[lane, which]) * self.granule % self.stride
            text = f"a thread wrote shared offset {offset}, with no fence.proxy.async since"
            access.fail(AsyncCopyHazard, lane, text)

    def _check_read(self, access: Access, cells: Array) -> None:
        self._check_written(access, cells)
        if self.check_races:
            self._remember_read(access, cells)

    def _check_written(self, access: Access, cells: Array) -> None:
        self._check_flight(access, cells)
        if not self.check_races:
            return
        block, warp, thread = self._identity(access)
        writer = self.writer[cells]
        foreign = (writer >= 0) & (writer != thread)
        if foreign.any():
            bad = foreign & (
                self.write_clock[cells] >= self.clocks.now[block, warp, np.maximum(writer, 0) >> 5]
            )
            if bad.any():
                self._fail_race(access, bad, writer, "reads", "written", cells)

    def _remember_read(self, access: Access, cells: Array) -> None:
        block, warp, thread = self._identity(access)
        clock = self.clocks.own(block, warp)
        previous = self.reader[cells, warp]
        shared = (self.read_clock[cells, warp] == clock) & (previous != thread)
        self.reader[cells, warp] = np.where(shared, MANY, thread)
        self.read_clock[cells, warp] = clock
        now = self.reader[cells, warp]
        clash = (now != thread) & (now != MANY)
        if clash.any():
            lane, which = np.nonzero(clash)
            self.reader[cells[lane, which], warp[lane, 0]] = MANY

    def _check_write(self, access: Access, cells: Array, same: Array, atomic: bool = False) -> None:
        self._check_flight(access, cells)
        busy = (self.being_read[cells] > 0).any(axis=1)
        if busy.any():
            text = "writes shared bytes that a wgmma under way reads"
            access.fail(AsyncCopyHazard, int(busy.argmax()), text)
        if not self.check_races:
            return
        block, warp, thread = self._identity(access)
        differs = ~same[:, None]
        writer = self.writer[cells]
        foreign = (writer >= 0) & (writer != thread) & differs
        if atomic:
            foreign &= ~self.writer_atomic[cells]
        if foreign.any():
            bad = foreign & (
                self.write_clock[cells] >= self.clocks.now[block, warp, np.maximum(writer, 0) >> 5]
            )
            if bad.any():
                self._fail_race(access, bad, writer, "writes", "written", cells)
        unordered = self.read_clock[cells] >= self.clocks.now[block, warp]
        if unordered.any():
            reader = self.reader[cells]
            bad = unordered & (reader != thread[:, :, None]) & differs[:, :, None]
            if bad.any():
                which = bad.argmax(axis=2)
                other = np.take_along_axis(reader, which[:, :, None], 2)[:, :, 0]
                self._fail_race(access, bad.any(axis=2), other, "writes", "read", cells)
        self.writer[cells] = thread
        self.writer_atomic[cells] = atomic
        self.write_clock[cells] = self.clocks.own(block, warp)


class LocalMemory:
    """Thread-local (stack) memory of all lanes."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 16) // 16) * 16
        self.bytes = np.zeros(lanes * self.stride, np.uint8)
        self.written = np.zeros(lanes * self.stride, bool)

    def _offsets(self, access: Access, addr: Array, nbytes: int) -> Array:
        access.check_aligned(addr, nbytes)
        offset = addr.astype(np.int64)
        bad = (offset < 0) | (offset + nbytes > self.size)
        if bad.any():
            at = int(bad.argmax())
            access.fail(
                OutOfBounds, at, f"local access at offset {int(offset[at])} of {self.size} bytes"
            )
        return offset + access.lanes * self.stride

    def load(
        self, access: Access, addr: Array, dtype: np.dtype, vector: int
    ) -> tuple[Array, Array | None]:
        nbytes = dtype.itemsize * vector
        offset = self._offsets(access, addr, nbytes)
        written = self.written[offset[:, None] + np.arange(nbytes)].all(axis=1)
        view, index = self.bytes.view(dtype), offset // dtype.itemsize
        return np.stack(
            [view[index + i] for i in range(vector)]
        ), None if written.all() else ~written

    def store(
        self, access: Access, addr: Array, values: Array, undefined: Array | None = None
    ) -> None:
        nbytes = values.dtype.itemsize * values.shape[0]
        offset = self._offsets(access, addr, nbytes)
        view, index = self.bytes.view(values.dtype), offset // values.dtype.itemsize
        for i in range(values.shape[0]):
            view[index + i] = values[i]
        self.written[offset[:, None] + np.arange(nbytes)] = (
            True if undefined is None else ~undefined[:, None]
        )
