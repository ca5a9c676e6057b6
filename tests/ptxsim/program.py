"""From a parsed function to executable steps: register slots, basic blocks, operand readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .block_order import is_strong
from .dtypes import Array, PtxType, bit_type
from .errors import PtxSyntaxError
from .machine import Machine, Step
from .memory import PARAM_START, SHARED_START
from .parser import Function, Imm, Instr, Mem, Operand, Reg, Sink, Sym, Variable, Vec

Reader = Callable[[Machine], Array]
Writer = Callable[[Machine, Array, Array | None], None]
ENDS_BLOCK = {"bra", "ret", "exit", "bar", "barrier", "trap"}


def waits(instr: Instr) -> bool:
    """Whether threads may go on at this instruction itself, later."""
    return instr.op == "mbarrier" and instr.parts[1] in ("try_wait", "test_wait")


def vector_size(instr: Instr) -> int:
    return next((int(p[1:]) for p in instr.parts if p in ("v2", "v4", "v8")), 1)


def ends_block(instr: Instr) -> bool:
    return instr.op in ENDS_BLOCK or waits(instr)


_COORDINATES: dict[str, Callable[[Machine, int], Array]] = {
    "tid": lambda m, axis: m.lane_thread // int(np.prod(m.block[:axis])) % m.block[axis],
    "ctaid": lambda m, axis: m.ctaid // int(np.prod(m.grid[:axis])) % m.grid[axis],
    "ntid": lambda m, axis: np.array([m.block[axis]]),
    "nctaid": lambda m, axis: np.array([m.grid[axis]]),
}
_LANE = {
    "eq": lambda n: 1 << n,
    "lt": lambda n: (1 << n) - 1,
    "le": lambda n: (2 << n) - 1,
    "gt": lambda n: 2**32 - (2 << n),
    "ge": lambda n: 2**32 - (1 << n),
}


def special_register(machine: Machine, name: str) -> Array | None:
    """Value of a special register, or None if ``name`` is not one."""
    head, _, axis = name[1:].partition(".")
    if head in _COORDINATES and axis:
        value = _COORDINATES[head](machine, "xyz".index(axis))
    elif head in ("laneid", "warpid"):
        value = machine.lane_thread & 31 if head == "laneid" else machine.lane_warp
    elif head.startswith("lanemask_"):
        value = _LANE[head[9:]]((machine.lane_thread & 31).astype(np.int64))
    elif head in ("nwarpid", "dynamic_smem_size", "total_smem_size"):
        value = np.array([machine.warps if head == "nwarpid" else machine.shared_size])
    elif head in (
        "clock",
        "clock_hi",
        "smid",
        "gridid",
        "cluster_ctarank",
        "clock64",
        "globaltimer",
        "clusterid",
        "cluster_ctaid",
    ):
        value = np.array([0])
    elif head in ("cluster_nctaid", "cluster_nctarank", "nclusterid", "nsmid"):
        value = np.array([1])
    else:
        return None
    return value.astype(np.uint64 if head in ("clock64", "globaltimer") else np.uint32)


@dataclass
class BasicBlock:
    """Straight-line code; the last step sends the active lanes onward."""

    index: int
    instrs: list[Instr] = field(default_factory=list)
    _steps: list[Step] | None = None

    def steps(self, program: Program) -> list[Step]:
        """The executable form, built on first use."""
        if self._steps is None:
            from .instructions import compile_instruction

            self._steps = [compile_instruction(i, program, self.index) for i in self.instrs]
            if not self.instrs or not ends_block(self.instrs[-1]):
                following = self.index + 1
                self._steps.append(lambda m: m.go(following, m.mask))
        return self._steps

    @cached_property
    def polls(self) -> bool:
        """Whether threads that come here again wait for what another one stores."""
        return any(i.op == "ld" and is_strong(i) for i in self.instrs)

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instrs)


class Program:
    """A function ready to run on a ``Machine``."""

    def __init__(
        self, function: Function, module_variables: list[Variable], addresses: dict[str, int]
    ) -> None:
        self.name, self.function = function.name, function
        self.slots: list[PtxType] = list(function.registers.values())
        self.slot_of = {name: i for i, name in enumerate(function.registers)}
        self.addresses = dict(addresses)
        self._lay_out(function, module_variables)
        self.params: dict[str, int] = {}
        self.param_bytes = 0
        for param in function.params:
            self.param_bytes = -(-self.param_bytes // param.align) * param.align
            self.params[param.name] = self.param_bytes
            self.addresses[param.name] = PARAM_START + self.param_bytes
            self.param_bytes += param.nbytes
        self.granule = self._granule()
        self.global_granule = self._global_granule()
        self.blocks, self.block_of = self._split()

    def _lay_out(self, function: Function, module_variables: list[Variable]) -> None:
        shared = local = 0
        dynamic, dynamic_align = [], 16
        for variable in function.variables + module_variables:
            if variable.space == "shared" and variable.extern:
                dynamic.append(variable.name)
                dynamic_align = max(dynamic_align, variable.align)
            elif variable.space == "shared":
                shared = -(-shared // variable.align) * variable.align
                self.addresses[variable.name] = SHARED_START + shared
                shared += variable.nbytes
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.addresses[variable.name] = local
                local += variable.nbytes
        self.static_shared = -(-shared // dynamic_align) * dynamic_align if dynamic else shared
        self.local_size = local
        for name in dynamic:
            self.addresses[name] = SHARED_START + self.static_shared

    def _granule(self) -> int:
        """Bytes per shadow cell: the narrowest shared-memory access of the kernel."""
        sizes = [16]
        for i in self.function.code:
            if i.op in ("ld", "st", "atom", "red") and i.mods.isdisjoint(
                {"global", "param", "local", "const"}
            ):
                sizes.append(i.type.nbytes * vector_size(i))
            elif i.op == "mbarrier":
                sizes.append(8)
            elif i.op == "cp" and isinstance(i.operands[2:3] and i.operands[2], Imm):
                sizes.append(i.operands[2].value)
        return min(sizes)

    def _global_granule(self) -> int:
        """The same of global memory: its narrowest store."""
        sizes = [16]
        for i in self.function.code:
            if i.op in ("st", "atom", "red") and i.mods.isdisjoint({"shared", "param", "local"}):
                sizes.append(i.type.nbytes * vector_size(i))
        return min(sizes)

    def _split(self) -> tuple[list[BasicBlock], dict[str, int]]:
        code, labels = self.function.code, self.function.labels
        leaders = {0, *labels.values()} | {n + 1 for n, i in enumerate(code) if ends_block(i)}
        leaders |= {n for n, i in enumerate(code) if waits(i)}
        starts = sorted(n for n in leaders if n < len(code))
        blocks = [
            BasicBlock(k, code[a:b])
            for k, (a, b) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True))
        ]
        blocks.append(BasicBlock(len(blocks), [Instr(0, "ret", ())]))  # falling off the end
        index = {start: k for k, start in enumerate(starts)}
        return blocks, {name: index.get(at, len(blocks) - 1) for name, at in labels.items()}

    # --- operands -------------------------------------------------------------------------------
    def slots_in(self, *operands: Operand | None) -> tuple[int, ...]:
        """Register slots that operands read."""
        found: list[int] = []
        for operand in operands:
            if isinstance(operand, Reg) and operand.name in self.slot_of:
                found.append(self.slot_of[operand.name])
            elif isinstance(operand, Vec):
                found += self.slots_in(*operand.items)
            elif isinstance(operand, Mem):
                found += self.slots_in(operand.base, *operand.extra)
        return tuple(found)

    def reader(self, operand: Operand, kind: PtxType) -> Reader:
        """A function that fetches the raw bits of an operand as ``kind.raw``."""
        if isinstance(operand, Imm):
            constant = np.array([operand.bits(kind)], np.uint64).astype(kind.raw)
            return lambda m: constant
        if isinstance(operand, Sym):
            if operand.name not in self.addresses:
                raise PtxSyntaxError(f"{self.name}: unknown symbol {operand.name}")
            address = np.array([self.addresses[operand.name] + operand.offset], np.uint64).astype(
                kind.raw
            )
            return lambda m: address
        if isinstance(operand, Reg):
            slot = self.slot_of.get(operand.name)
            if slot is None:
                return self._special_reader(operand.name, kind)
            if operand.negated:
                return lambda m: ~m.read(slot)
            if self.slots[slot].raw == kind.raw:
                return lambda m: m.read(slot)
            return lambda m: m.read(slot).astype(kind.raw)
        raise PtxSyntaxError(f"{self.name}: cannot read operand {operand}")

    def _special_reader(self, name: str, kind: PtxType) -> Reader:
        def read(m: Machine) -> Array:
            value = special_register(m, name)
            if value is None:
                raise PtxSyntaxError(f"{self.name}: unknown register {name}")
            return value.astype(kind.raw, copy=False)

        return read

    def writer(self, operand: Operand, kind: PtxType) -> Writer:
        """A function that stores bits of type ``kind`` into a register, extended if it is wider."""
        if isinstance(operand, Sink):
            return lambda m, value, poison: None
        if not isinstance(operand, Reg) or operand.name not in self.slot_of:
            raise PtxSyntaxError(f"{self.name}: cannot write operand {operand}")
        slot = self.slot_of[operand.name]
        raw = self.slots[slot].raw
        if raw == kind.raw:
            return lambda m, value, poison: m.write(slot, value, poison)
        if kind.kind == "s" and raw.itemsize > kind.nbytes:
            signed, wide = np.dtype(f"i{kind.nbytes}"), np.dtype(f"i{raw.itemsize}")
            return lambda m, value, poison: m.write(
                slot, value.view(signed).astype(wide).view(raw), poison
            )
        return lambda m, value, poison: m.write(slot, value.astype(raw), poison)

    def register_type(self, operand: Operand) -> PtxType:
        """The bit type of a register operand (b32 for anything else)."""
        if isinstance(operand, Reg) and operand.name in self.slot_of:
            return bit_type(self.slots[self.slot_of[operand.name]].bits)
        return bit_type(32)
