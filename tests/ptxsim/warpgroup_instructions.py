"""wgmma: products of a warpgroup (128 threads) that run on after they were issued.

The numbers are computed when a product is issued. Until its wait the registers count as undefined,
and nobody may write the shared memory that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .alu import unsupported
from .dtypes import TYPES, Array, PtxType
from .errors import AsyncCopyHazard, UninitialisedRead, WarpMaskError
from .machine import Machine, Step
from .memory import SHARED_START, Access
from .operands import B32, PRED, U64, count_access, opcode, vector_of
from .parser import Imm, Instr, Vec
from .program import Program

SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""A descriptor's swizzle: bytes of a row, and which of the address bits 7 to 9 flip bits 4 to 6."""


@dataclass
class Product:
    """Shared memory that a product under way reads, by its group."""

    access: Access
    cells: Array
    group: Array  # of each reading lane


def check_warpgroups(m: Machine, instr: Instr) -> None:
    lanes = m.mask.reshape(-1, 128) if m.padded % 128 == 0 else None
    if lanes is None or (lanes.any(axis=1) & ~lanes.all(axis=1)).any():
        text = "not all 128 threads of the warpgroup execute it"
        m.fail(WarpMaskError, instr, text, int(m.active[0]))


@opcode("wgmma")
def _wgmma(instr: Instr, program: Program, _: int) -> Step:
    if instr.parts[1] == "fence":

        def fence(m: Machine) -> None:
            check_warpgroups(m, instr)
            m.products_fenced = m.products_fenced | m.mask

        return fence
    if instr.parts[1] == "commit_group":

        def commit(m: Machine) -> None:
            m.product_group = m.product_group + m.mask

        return commit
    if instr.parts[1] == "wait_group":
        keep = instr.operands[0]
        assert isinstance(keep, Imm)
        return lambda m: wait_products(m, keep.value)
    return _product(instr, program)


def wait_products(m: Machine, keep: int) -> None:
    """The active lanes' products are over, but for the newest ``keep`` groups."""
    m.products_fenced = m.products_fenced & ~m.mask
    limit = np.where(m.mask, m.product_group - keep, 0)
    m.settle(limit)
    remaining = []
    for product in m.products:
        over = product.group < limit[product.access.lanes]
        done = Access(m, product.access.instr, product.access.lanes[over])
        m.shared.end_read(done, product.cells[over])
        if not over.all():
            left = Access(m, product.access.instr, product.access.lanes[~over])
            remaining.append(Product(left, product.cells[~over], product.group[~over]))
    m.products = remaining


@dataclass(frozen=True)
class Operand:
    """A descriptor's matrix, `rows` along M or N by 16 along K; `across`: K is not contiguous."""

    rows: int
    across: bool

    def addresses(self, m: Machine, instr: Instr, descriptor: Array, lanes: Array) -> Array:
        """(warpgroups, pieces) addresses of its 16-byte pieces, eight of an access's phase in a
        row."""
        word = descriptor.reshape(-1, 128)
        if (word != word[:, :1]).any():
            at = int(lanes[int((word != word[:, :1]).any(axis=1).argmax()) * 128])
            m.fail(WarpMaskError, instr, "descriptors differ within the warpgroup", at)
        word = word[:, :1].astype(np.int64)
        start, lead, stride = ((word >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        kinds = np.unique(word >> 62 & 3)
        if len(kinds) != 1 or int(kinds[0]) not in SWIZZLES or (word >> 49 & 7).any():
            raise unsupported(instr)
        width, flips = SWIZZLES[int(kinds[0])]
        if self.across:  # pieces of 8 along M or N, one for each step along K
            piece, depth = np.arange(self.rows // 8)[:, None], np.arange(16)[None, :]
            panel, inside = piece // (width // 16), piece % (width // 16)
            offset = panel * lead[..., None] + depth // 8 * stride[..., None]
            offset = offset + depth % 8 * width + inside * 16
        else:  # pieces of 8 along K
            half, row = np.arange(2)[:, None], np.arange(self.rows)[None, :]
            offset = row // 8 * stride[..., None] + row % 8 * width + half * 16
        address = start + offset.reshape(len(word), -1)
        return address ^ ((address >> 7 & flips) << 4)

    def matrix(self, pieces: Array, kind: PtxType) -> Array:
        """(warpgroups, rows, 16) of (warpgroups, pieces, 4) words."""
        halves = np.ascontiguousarray(pieces).view(np.uint16)
        values = kind.decode(halves.reshape(-1)).reshape(halves.shape)
        if self.across:
            shaped = values.reshape(len(values), self.rows // 8, 16, 8)
            return shaped.transpose(0, 1, 3, 2).reshape(len(values), self.rows, 16)
        shaped = values.reshape(len(values), 2, self.rows, 8)
        return shaped.transpose(0, 2, 1, 3).reshape(len(values), self.rows, 16)


def _product(instr: Instr, program: Program) -> Step:
    shape = next(p for p in instr.parts if p.startswith("m64n"))
    columns, depth = (int(x) for x in shape[4:].split("k"))
    kinds = [p for p in instr.parts if p in TYPES]
    d, left, right, scale, *rest = instr.operands
    flags = [o.value for o in rest if isinstance(o, Imm)]
    in_registers = isinstance(left, Vec)
    signs, transposed = flags[:2], flags[2:]
    if kinds not in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]) or depth != 16:
        raise unsupported(instr)
    if signs != [1, 1] or len(transposed) != (1 if in_registers else 2):
        raise unsupported(instr)
    kind = TYPES[kinds[1]]
    accumulators, a_registers = vector_of(d), vector_of(left) if in_registers else ()
    readers = [program.reader(o, B32) for o in accumulators]
    writers = [program.writer(o, B32) for o in accumulators]
    c_slots, a_slots = program.slots_in(*accumulators), program.slots_in(*a_registers)
    read_a = [program.reader(o, B32) for o in a_registers]
    read_left = None if in_registers else program.reader(left, U64)
    read_right, adds = program.reader(right, U64), program.reader(scale, PRED)
    a_operand = None if in_registers else Operand(64, bool(transposed[0]))
    b_operand = Operand(columns, bool(transposed[-1]))

    def shared_matrix(m: Machine, operand: Operand, descriptor: Array) -> Array:
        lanes = m.active
        addr = operand.addresses(m, instr, m.spread(descriptor)[lanes], lanes)
        groups, pieces = addr.shape
        readers_of = np.broadcast_to(
            lanes.reshape(groups, 1, 128), (groups, -(-pieces // 128), 128)
        ).reshape(groups, -1)[:, :pieces]
        access = Access(m, instr, readers_of.reshape(-1))
        flat = addr.reshape(-1).astype(np.uint64)
        for part in range(0, pieces, 128):
            some = slice(part, min(part + 128, pieces))
            who, where = readers_of[:, some].reshape(-1), addr[:, some].reshape(-1)
            count_access(m, instr, "shared", who, where.astype(np.uint64), 16)
        values, bad, cells = m.shared.begin_read(access, flat, np.dtype(np.uint32), 4)
        if bad is not None:
            text = f"reads uninitialised shared offset {int(flat[bad.argmax()]) - SHARED_START}"
            access.fail(UninitialisedRead, int(bad.argmax()), text)
        m.products.append(Product(access, cells, m.product_group[access.lanes]))
        return operand.matrix(values.T.reshape(groups, pieces, 4), kind)

    def left_matrix(m: Machine) -> Array:
        if a_operand is not None and read_left is not None:
            return shared_matrix(m, a_operand, read_left(m))
        for slot in a_slots:
            if m.is_under_way(slot):
                text = "operand A is the result of a wgmma that has not been waited for"
                m.fail(AsyncCopyHazard, instr, text, int(m.active[0]))
        m.require_defined(instr, a_slots, "operand A")
        raw = np.stack([m.spread(r(m))[m.active] for r in read_a], axis=-1)
        values = kind.decode(np.ascontiguousarray(raw).view(kind.raw).reshape(-1))
        fragments = values.reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5)
        return fragments.reshape(-1, 64, 16)

    def multiply(m: Machine) -> None:
        check_warpgroups(m, instr)
        if not m.products_fenced[m.active].all():
            text = "there is no wgmma.fence since the last wait"
            m.fail(AsyncCopyHazard, instr, text, int(m.active[0]))
        x, y = left_matrix(m), shared_matrix(m, b_operand, read_right(m))
        result = np.matmul(x.astype(np.float64), y.astype(np.float64).transpose(0, 2, 1))
        add = m.spread(adds(m))[m.active].reshape(-1, 128)
        if add.any():
            m.require_settled(instr, c_slots, "accumulator")
            raw = np.stack([m.spread(r(m))[m.active] for r in readers], axis=-1).view(np.float32)
            # A lane's register 4 n + 2 half + e: row lane // 4 + 8 half,
            # column 8 n + 2 (lane % 4) + e.
            old = raw.reshape(-1, 4, 8, 4, columns // 8, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6)
            result = result + np.where(add[:, :1, None], old.reshape(-1, 64, columns), 0)
        shaped = result.astype(np.float32).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        flat = shaped.transpose(0, 1, 3, 5, 4, 2, 6).reshape(-1, columns // 2)
        bits = np.ascontiguousarray(flat).view(np.uint32)
        for k, write in enumerate(writers):
            full = np.zeros(m.lanes, np.uint32)
            full[m.active] = bits[:, k]
            write(m, full, m.mask)
        m.begin_product(c_slots)

    return multiply
