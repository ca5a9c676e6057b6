"""cp.async.bulk: copies to shared memory that a barrier waits for, of boxes by tensor maps or of
plain bytes.

A copy arrives as late as it can, when nothing else can run: whoever does not wait meets its bytes
in flight.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .alu import unsupported
from .dtypes import Array
from .errors import AsyncCopyHazard, Misaligned, OutOfBounds
from .machine import Machine, Step
from .memory import PARAM_START, Access
from .memory_barriers import MemoryBarrier, barrier_at, complete_bytes
from .operands import U32, U64, memory_address, vector_of
from .parser import Instr, Mem
from .program import Program

SWIZZLES = {0: (0, 16), 1: (1, 32), 2: (3, 64), 3: (7, 128)}
"""A tensor map's swizzle: which of the address bits 7 to 9 flip bits 4 to 6, and its widest row."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that is copied; the innermost axis comes first.

    The driver's 128 bytes are opaque; here the stand-in for its function (tests/gpu/runtime.cpp)
    writes ``FORMAT``: address, rank, bytes of an element, swizzle, sizes, strides in bytes, box.
    """

    address: int
    itemsize: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    FORMAT = "<Q4I5Q5Q5I"

    @classmethod
    def of(cls, data: bytes) -> TensorMap:
        address, rank, itemsize, swizzle, _, *rest = struct.unpack_from(cls.FORMAT, data)
        sizes, strides, box = (tuple(rest[i : i + rank]) for i in (0, 5, 10))
        return cls(address, itemsize, swizzle, sizes, strides, box)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def pieces(self, start: tuple[int, ...]) -> tuple[Array, Array]:
        """Of the box at these coordinates, in pieces of 16 bytes: addresses, and which exist."""
        index = np.indices(self.box[::-1])[::-1, ..., :: 16 // self.itemsize]
        place = index.reshape(len(self.box), -1) + np.array(start)[:, None]
        inside = ((place >= 0) & (place < np.array(self.sizes)[:, None])).all(axis=0)
        offsets = (place * np.array(self.strides)[:, None]).sum(axis=0)
        return np.where(inside, offsets + self.address, 0).astype(np.uint64), inside

    def spread(self, to: int) -> Array:
        """Where those pieces lie in shared memory, from address ``to`` on."""
        address = to + 16 * np.arange(self.nbytes // 16)
        return address ^ ((address >> 7 & SWIZZLES[self.swizzle][0]) << 4)


@dataclass
class Transfer:
    """A bulk copy under way."""

    access: Access
    addr: Array
    values: Array
    barrier: MemoryBarrier
    clock: Array

    def land(self, m: Machine) -> None:
        lane = int(self.access.lanes[0])
        block = m.lane_block == m.lane_block[lane]
        if not (m.alive & block).any():
            text = "the block ended before its bulk copy"
            m.fail(AsyncCopyHazard, self.access.instr, text, lane)
        m.shared.land(self.access, self.addr, self.values)
        complete_bytes(m, self.barrier, self.values.nbytes, self.clock)


def bulk_copy(instr: Instr, program: Program) -> Step:
    if "complete_tx::bytes" not in ".".join(instr.parts) or instr.mods & {"multicast::cluster"}:
        raise unsupported(instr)
    tensor = "tensor" in instr.mods
    to, _a = memory_address(instr, program, instr.operands[0])
    source, _b = memory_address(instr, program, instr.operands[1])
    barriers, _c = memory_address(instr, program, instr.operands[2 if tensor else 3])
    box = instr.operands[1]
    assert isinstance(box, Mem)
    axes = [axis for part in box.extra for axis in vector_of(part)]
    coordinates = [program.reader(axis, U32) for axis in axes]
    size = None if tensor else program.reader(instr.operands[2], U64)

    def copy(m: Machine) -> None:
        starts = [m.spread(r(m))[m.active].astype(np.int32) for r in coordinates]
        sizes = [] if size is None else m.spread(size(m))[m.active].tolist()
        for k, (lane, dest, origin, barrier) in enumerate(
            zip(m.active, to(m), source(m), barriers(m), strict=True)
        ):
            one = Access(m, instr, np.array([lane]))
            if tensor:
                start = tuple(int(s[k]) for s in starts)
                table = TensorMap.of(read_map(m, instr, int(lane), int(origin)))
                if len(start) != len(table.box):
                    raise unsupported(instr)
                aligned = 128 if table.swizzle else 16
                addr, (addresses, inside) = table.spread(int(dest)), table.pieces(start)
            else:
                aligned, count = 16, sizes[k] // 16
                addr = int(dest) + 16 * np.arange(count)
                addresses = int(origin) + 16 * np.arange(count, dtype=np.uint64)
                inside = np.ones(count, bool)
                one.check_aligned(np.array([sizes[k]]), 16)
            if int(dest) % aligned:
                m.fail(Misaligned, instr, f"address {int(dest):#x}: not {aligned} bytes", int(lane))
            access = Access(m, instr, np.full(addr.size, lane))
            values = np.zeros((4, addr.size), np.uint32)
            if inside.any():
                chosen = Access(m, instr, access.lanes[inside])
                kind = np.dtype(np.uint32)
                values[:, inside] = m.memory.load(chosen, addresses[inside], kind, 4)
            where = np.array([barrier])
            m.shared.load(one, where, np.dtype(np.uint64), 1)
            m.shared.check_fenced(one, where, 8)
            m.shared.begin_copy(access, addr.astype(np.uint64), 16, bulk=True)
            clock = m.clocks.release(m.lane_block[one.lanes], m.lane_warp[one.lanes])[0]
            found = barrier_at(m, instr, int(lane), int(barrier))
            m.transfers.append(Transfer(access, addr.astype(np.uint64), values, found, clock))

    return copy


def read_map(m: Machine, instr: Instr, lane: int, address: int) -> bytes:
    """A tensor map's bytes: a parameter of the kernel, or in global memory."""
    if address % 64:
        m.fail(Misaligned, instr, f"tensor map at {address:#x}: not a multiple of 64", lane)
    start = address - PARAM_START
    if 0 <= start < len(m.params):
        if start + 128 > len(m.params):
            m.fail(OutOfBounds, instr, "the tensor map reaches past the parameters", lane)
        return m.params[start : start + 128]
    access = Access(m, instr, np.full(8, lane))
    at = np.uint64(address) + 16 * np.arange(8, dtype=np.uint64)
    return np.ascontiguousarray(m.memory.load(access, at, np.dtype(np.uint32), 4).T).tobytes()
