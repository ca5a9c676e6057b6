"""Lock-step execution of a chunk of thread blocks, one NumPy lane per thread.

Threads that are at the same basic block form a group. The group with the lowest program counter
runs first, so that divergent branches reconverge at the earliest common block. Threads at a
barrier wait until every live thread of their block (or the given count) has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .errors import AsyncCopyHazard, BarrierError, KernelFault, Livelock, UninitialisedRead
from .memory import Clocks, GlobalMemory, LocalMemory, SharedMemory
from .parser import Instr
from .stats import Stats

if TYPE_CHECKING:
    from .bulk_copies import Transfer
    from .memory_barriers import Barriers
    from .program import Program
    from .warpgroup_instructions import Product

Array = np.ndarray
Step = Callable[["Machine"], None]


@dataclass(frozen=True)
class Options:
    """Which checks run. ``races`` and ``statistics`` are the costly ones."""

    races: bool = True
    uninitialised: bool = True
    statistics: bool = False
    max_steps: int = 20_000_000
    lanes_per_chunk: int = 8192


@dataclass
class PendingCopy:
    """A cp.async that has been issued but not waited for."""

    instr: Instr
    lanes: Array
    group: Array
    addr: Array
    values: Array


@dataclass
class Barrier:
    """One named barrier of the chunk: who has arrived, and who waits for release."""

    arrived: Array
    waiting: Array
    resume: Array
    count: int | None = None
    finish: list[Callable[[Array], None]] = field(default_factory=list)


class Machine:
    """Registers, masks, barriers and memories of ``blocks`` consecutive thread blocks."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        first_block: int,
        blocks: int,
        memory: GlobalMemory,
        params: bytes,
        shared_size: int,
        options: Options,
        stats: Stats,
    ) -> None:
        self.program, self.grid, self.block, self.options, self.stats = (
            program,
            grid,
            block,
            options,
            stats,
        )
        self.memory, self.params, self.shared_size = memory, params, shared_size
        self.blocks, self.threads = blocks, int(np.prod(block))
        self.warps = -(-self.threads // 32)
        self.padded = self.warps * 32
        self.lanes = blocks * self.padded

        lane = np.arange(self.lanes)
        self.lane_block = lane // self.padded
        self.lane_thread = lane % self.padded
        self.lane_warp = self.lane_thread >> 5
        self.ctaid = first_block + self.lane_block
        self.alive = self.lane_thread < self.threads
        self.all_alive = bool(self.alive.all())
        self.mask = self.alive
        self.full = True
        self._lanes: Array | None = None

        self.registers: list[Array | None] = [None] * len(program.slots)
        self.undefined: dict[int, Array] = {}
        self.low_half: dict[int, Array | None] = {}  # of an undefined pair: its low half's lanes
        self.clocks = Clocks(blocks, self.warps)
        self.shared = SharedMemory(blocks, shared_size, program.granule, self.clocks, options.races)
        self.local = LocalMemory(self.lanes, program.local_size)
        self.pending: dict[int, Array] = {}
        self.barriers: dict[int, Barrier] = {}
        self.copies: list[PendingCopy] = []
        self.copy_group = np.zeros(self.lanes, np.int64)
        self.memory_barriers: Barriers = {}
        self.sleeping: dict[int, Array] = {}  # who waits for what others do, by where to go on
        self.transfers: list[Transfer] = []
        self.products: list[Product] = []
        self.product_group = np.zeros(self.lanes, np.int64)
        self.products_fenced = np.zeros(self.lanes, bool)
        self.under_way: dict[int, Array] = {}  # results of wgmma: by slot, each lane's group or -1

    # --- masks ----------------------------------------------------------------------------------
    def set_mask(self, mask: Array) -> None:
        """Make ``mask`` the active lanes."""
        self.mask = mask
        self.full = mask is self.alive or bool((mask == self.alive).all())
        self._lanes = None

    @property
    def active(self) -> Array:
        """Indices of the active lanes."""
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes

    @contextmanager
    def only(self, mask: Array) -> Iterator[None]:
        """Temporarily narrow the active lanes (a guarded instruction)."""
        saved = self.mask, self.full, self._lanes
        self.mask, self.full, self._lanes = mask, False, None
        try:
            yield
        finally:
            self.mask, self.full, self._lanes = saved

    # --- registers ------------------------------------------------------------------------------
    def read(self, slot: int) -> Array:
        """Raw bits of a register: shape (lanes,), or (1,) when uniform."""
        value = self.registers[slot]
        if value is None:
            dtype = self.program.slots[slot].raw
            value = self.registers[slot] = np.zeros(1, dtype)
            self.undefined[slot] = np.ones(self.lanes, bool)
        return value

    def write(self, slot: int, value: Array, poison: Array | None = None) -> None:
        """Write the active lanes of a register; ``poison`` marks undefined results."""
        if self.low_half:
            self.low_half.pop(slot, None)
        if slot in self.under_way:
            self.under_way[slot] = np.where(self.mask, -1, self.under_way[slot])
        if self.full:
            self.registers[slot] = value
            if poison is not None:
                self.undefined[slot] = poison & self.mask
            elif self.undefined:
                self.undefined.pop(slot, None)
            return
        old = self.registers[slot]
        if old is None:
            self.registers[slot] = (
                value if value.size == 1 else np.where(self.mask, value, np.zeros(1, value.dtype))
            )
            bad = self.alive & ~self.mask if poison is None else self.alive & (~self.mask | poison)
        else:
            self.registers[slot] = np.where(self.mask, value, old)
            before = self.undefined.get(slot)
            if before is None and poison is None:
                return
            bad = np.zeros(self.lanes, bool) if before is None else before & ~self.mask
            if poison is not None:
                bad = bad | (poison & self.mask)
        if bad.any():
            self.undefined[slot] = bad
        else:
            self.undefined.pop(slot, None)

    def spread(self, value: Array) -> Array:
        """A value with one element per lane."""
        return value if value.size == self.lanes else np.broadcast_to(value, (self.lanes,))

    def poison_of(self, slots: tuple[int, ...]) -> Array | None:
        """Active lanes for which any of these registers is undefined (None: there are none)."""
        if not self.undefined:
            return None
        found = None
        for slot in slots:
            undefined = self.undefined.get(slot)
            if undefined is not None:
                found = undefined if found is None else found | undefined
        if found is None:
            return None
        found = found & self.mask
        return found if found.any() else None

    def require_defined(self, instr: Instr, slots: tuple[int, ...], what: str) -> None:
        """Fault if an undefined register of an active lane is used as ``what``."""
        if not self.options.uninitialised:
            return
        for slot in slots:
            self.read(slot)  # marks a register that was never written
        poison = self.poison_of(slots)
        if poison is not None:
            lane = int(poison.argmax())
            names = [
                n
                for n, s in self.program.slot_of.items()
                if s in slots and s in self.undefined and self.undefined[s][lane]
            ]
            self.fail(
                UninitialisedRead,
                instr,
                f"{what} depends on uninitialised {', '.join(names)}",
                lane,
            )

    # --- results of products under way ------------------------------------------------------------
    def begin_product(self, slots: tuple[int, ...]) -> None:
        """The active lanes' registers are written by a wgmma: undefined until it is waited for."""
        for slot in slots:
            before = self.under_way.get(slot, np.full(1, -1))
            self.under_way[slot] = np.where(self.mask, self.product_group, before)

    def is_under_way(self, slot: int) -> bool:
        found = self.under_way.get(slot)
        return found is not None and bool((found[self.mask] >= 0).any())

    def carry(self, dest: int, source: int) -> None:
        """A move, which the assembler removes, takes a result under way along."""
        if source in self.under_way:
            before = self.under_way.get(dest, np.full(1, -1))
            self.under_way[dest] = np.where(self.mask, self.under_way[source], before)

    def settle(self, limit: Array) -> None:
        """Results of groups below each lane's limit are there."""
        for slot, group in list(self.under_way.items()):
            over = (group >= 0) & (group < limit)
            if slot in self.undefined:
                self.undefined[slot] = self.undefined[slot] & ~over
                if not self.undefined[slot].any():
                    del self.undefined[slot]
            self.under_way[slot] = np.where(over, -1, group)
            if (self.under_way[slot] < 0).all():
                del self.under_way[slot]

    def require_settled(self, instr: Instr, slots: tuple[int, ...], what: str) -> None:
        """Fault if a register is undefined for another reason than a product under way."""
        for slot in slots:
            bad = self.undefined.get(slot)
            if bad is not None:
                bad = bad & self.mask & (self.under_way.get(slot, np.full(1, -1)) < 0)
                if bad.any():
                    text = f"{what} depends on an uninitialised register"
                    self.fail(UninitialisedRead, instr, text, int(bad.argmax()))

    # --- reporting ------------------------------------------------------------------------------
    def block_name(self, block: int) -> str:
        bx, by, _ = self.grid
        return f"block ({block % bx}, {block // bx % by}, {block // (bx * by)})"

    def thread_name(self, lane: int) -> str:
        tx, ty, _ = self.block
        thread = int(self.lane_thread[lane])
        return (
            f"{self.block_name(int(self.ctaid[lane]))} "
            f"thread ({thread % tx}, {thread // tx % ty}, {thread // (tx * ty)})"
        )

    def fail(self, kind: type[KernelFault], instr: Instr, text: str, lane: int) -> NoReturn:
        raise kind(f"{self.program.name}: {text}\n  {self.thread_name(lane)}\n  {instr.where}")

    # --- scheduling -----------------------------------------------------------------------------
    def go(self, block: int, mask: Array) -> None:
        """Queue lanes to run a basic block."""
        waiting = self.pending.get(block)
        self.pending[block] = mask if waiting is None else waiting | mask

    def sleep(self, block: int, mask: Array) -> None:
        """Lanes wait for an mbarrier, or for a value in global memory; they try again, at
        ``block``, when some phase is over or something is stored."""
        self.sleeping[block] = self.sleeping.get(block, False) | mask

    def wake(self) -> None:
        for block, mask in self.sleeping.items():
            self.go(block, mask)
        self.sleeping.clear()

    def land(self) -> bool:
        """Let the oldest bulk copy arrive; False if none is under way."""
        if self.transfers:
            self.transfers.pop(0).land(self)
            return True
        return False

    def retire(self, mask: Array) -> None:
        """End the lanes of ``mask``."""
        for product in self.products:
            if mask[product.access.lanes].any():
                text = "the thread ends before its wgmma"
                self.fail(AsyncCopyHazard, product.access.instr, text, int(product.access.lanes[0]))
        self.alive = self.alive & ~mask
        self.all_alive = False
        for barrier in list(self.barriers.values()):
            self._release(barrier)

    def arrive(
        self,
        number: int,
        mask: Array,
        resume: int,
        count: int | None,
        wait: bool,
        finish: Callable[[Array], None] | None = None,
    ) -> None:
        """Lanes reach barrier ``number``; they go on at ``resume`` (at once if not ``wait``)."""
        barrier = self.barriers.get(number)
        if barrier is None:
            none = np.zeros(self.lanes, bool)
            barrier = self.barriers[number] = Barrier(none, none, np.zeros(self.lanes, np.int64))
        barrier.arrived = barrier.arrived | mask
        barrier.count = count
        if finish:
            barrier.finish.append(finish)
        if wait:
            barrier.waiting = barrier.waiting | mask
            barrier.resume = np.where(mask, resume, barrier.resume)
        else:
            self.go(resume, mask)
        self._release(barrier)

    def _release(self, barrier: Barrier) -> None:
        arrived = barrier.arrived.reshape(self.blocks, self.padded)
        live = self.alive.reshape(self.blocks, self.padded)
        present = arrived.sum(axis=1)
        needed = live.sum(axis=1) if barrier.count is None else barrier.count
        ready = (present > 0) & (present >= needed)
        if not ready.any():
            return
        lanes = np.repeat(ready, self.padded)
        members = (arrived & ready[:, None]).reshape(self.blocks, self.warps, 32).any(axis=2)
        self.clocks.barrier(members)
        for finish in barrier.finish:
            finish(barrier.arrived & lanes)
        freed = barrier.waiting & lanes
        barrier.arrived = barrier.arrived & ~lanes
        barrier.waiting = barrier.waiting & ~lanes
        if not barrier.arrived.any():
            barrier.finish.clear()
        for block in np.unique(barrier.resume[freed]):
            self.go(int(block), freed & (barrier.resume == block))

    def run(self) -> None:
        """Run every lane to its end."""
        self.go(0, self.alive)
        blocks, steps = self.program.blocks, 0
        collect = self.options.statistics
        while self.pending or self.land():
            if not self.pending:
                continue
            at = min(self.pending)
            mask = self.pending.pop(at)
            self.set_mask(mask)
            block = blocks[at]
            for step in block.steps(self.program):
                step(self)
            if block.polls and at in self.pending:
                self.sleep(at, self.pending.pop(at))
            count = len(block.instrs)
            steps += count
            self.stats.instructions += count * (
                self.lanes if self.full and self.all_alive else int(mask.sum())
            )
            if collect:
                self.stats.opcodes.update(block.opcodes)
            if steps > self.options.max_steps:
                raise Livelock(
                    f"{self.program.name}: more than {self.options.max_steps} steps (a spin lock "
                    f"whose holder never runs?)\n  {block.instrs[-1].where if block.instrs else ''}"
                )
        self.stats.issued += steps
        if self.sleeping:
            block, mask = next(iter(self.sleeping.items()))
            what = "a value in global memory" if blocks[block].polls else "an mbarrier"
            text = f"{int(mask.sum())} threads wait forever for {what}, this one among them"
            self.fail(BarrierError, blocks[block].instrs[0], text, int(mask.argmax()))
        stuck = [n for n, b in self.barriers.items() if b.waiting.any()]
        if stuck:
            barrier = self.barriers[stuck[0]]
            lane = int(barrier.waiting.argmax())
            raise BarrierError(
                f"{self.program.name}: {int(barrier.waiting.sum())} threads wait forever at "
                f"barrier {stuck[0]}\n  first: {self.thread_name(lane)}"
            )
