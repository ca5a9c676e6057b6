"""Loading PTX and launching kernels on NumPy arrays (or CPU torch tensors)."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from . import (  # noqa: F401 (opcodes)
    instructions,
    matrix_instructions,
    memory_barriers,
    memory_instructions,
    warp_instructions,
    warpgroup_instructions,
)
from .alu import ALU
from .block_order import BlockOrder
from .errors import LaunchError
from .machine import Machine, Options
from .memory import GlobalMemory
from .operands import OPCODES
from .parser import Function, Variable, parse
from .program import Program
from .stats import Stats

Dim = int | Sequence[int]
_SCALAR = {
    "u8": "B",
    "s8": "b",
    "b8": "B",
    "u16": "H",
    "s16": "h",
    "b16": "H",
    "u32": "I",
    "s32": "i",
    "b32": "I",
    "u64": "Q",
    "s64": "q",
    "b64": "Q",
    "f32": "f",
    "f64": "d",
    "f16": "e",
}


def _dim3(value: Dim) -> tuple[int, int, int]:
    dims = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if not 1 <= len(dims) <= 3 or min(dims) < 1:
        raise LaunchError(f"bad grid or block {value}")
    return (*dims, 1, 1)[:3]  # type: ignore[return-value]


def _bytes_at(address: int, size: int) -> np.ndarray:
    return (
        np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        if size
        else np.zeros(0, np.uint8)
    )


class _Buffers:
    """Maps host arrays to device pointers; views of one buffer share one allocation."""

    def __init__(self, memory: GlobalMemory) -> None:
        self.memory = memory
        self.known: dict[tuple[int, int, bool], int] = {}
        self.keep: list[Any] = []

    def pointer(self, array: Any, name: str) -> int:
        """Device address of the first element of ``array``."""
        if hasattr(array, "untyped_storage"):
            storage = array.untyped_storage()
            low, high, first, readonly = (
                storage.data_ptr(),
                storage.data_ptr() + storage.nbytes(),
                array.data_ptr(),
                False,
            )
        else:
            root = array
            while isinstance(root.base, np.ndarray):
                root = root.base
            (low, high), first = byte_bounds(root), array.__array_interface__["data"][0]
            readonly = not array.flags.writeable
        key = (low, high, readonly)
        if key not in self.known:
            self.keep.append(array)
            self.known[key] = self.memory.add(_bytes_at(low, high - low), name, readonly)
        return self.known[key] + first - low


class Module:
    """A loaded PTX module."""

    def __init__(self, text: str, options: Options | None = None) -> None:
        self.ptx = parse(text)
        self.options = options or Options()
        self.stats = Stats()
        self._globals = [
            v for v in self.ptx.variables if v.space in ("global", "const") and not v.extern
        ]
        addresses, memory = {}, GlobalMemory()
        for variable in self._globals:
            addresses[variable.name] = memory.add(
                np.zeros(variable.nbytes, np.uint8), variable.name
            )
        self._data = [self._initial(v, addresses) for v in self._globals]
        self._addresses = addresses
        self._programs: dict[str, Program] = {}

    @staticmethod
    def _initial(variable: Variable, addresses: dict[str, int]) -> np.ndarray:
        data = np.zeros(max(variable.count, 1), variable.type.raw)
        for k, value in enumerate(variable.init):
            number = addresses.get(value, 0) if isinstance(value, str) else value
            data[k] = np.uint64(number & (2**64 - 1)).astype(variable.type.raw)
        return data.view(np.uint8)

    @property
    def kernels(self) -> list[str]:
        """Names of the entry functions."""
        return [f.name for f in self.ptx.functions.values() if f.entry]

    def unsupported(self) -> list[str]:
        """Opcodes of the module that have no rule here (variants of others may have none)."""
        return sorted(
            {
                f"{i.opcode} ({f.name}, PTX line {i.line})"
                for f in self.ptx.functions.values()
                for i in f.code
                if i.op not in OPCODES and i.op not in ALU
            }
        )

    def program(self, name: str) -> Program:
        """The executable form of a kernel."""
        if name not in self._programs:
            function = self.ptx.functions.get(name)
            if function is None or not function.entry:
                raise LaunchError(f"no kernel {name!r}; there are {', '.join(self.kernels)}")
            self._programs[name] = Program(function, self.ptx.variables, self._addresses)
        return self._programs[name]

    def launch(
        self,
        kernel: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        shared_bytes: int = 0,
        allocations: Sequence[tuple[int, np.ndarray, str]] = (),
        **options: Any,
    ) -> Stats:
        """Run a kernel to completion; arrays among ``args`` are mutated in place.

        ``allocations`` are byte buffers that the kernel finds at addresses of their own (address,
        bytes, name), for pointers inside of structs, which come as bytes. ``options`` override
        fields of ``Options`` for this launch. Returns statistics.
        """
        chosen = replace(self.options, **options)
        program = self.program(kernel)
        grid3, block3 = _dim3(grid), _dim3(block)
        threads = int(np.prod(block3))
        required = program.function.reqntid
        if threads > 1024 or (required and required != block3):
            raise LaunchError(
                f"{kernel}: block {block3} is not allowed"
                + (f"; it needs {required}" if required else "")
            )
        total = int(np.prod(grid3))
        order = BlockOrder(
            total, -(-threads // 32), program.global_granule, any(b.polls for b in program.blocks)
        )
        memory = GlobalMemory(order if chosen.races else None)
        for variable, data in zip(self._globals, self._data, strict=True):
            memory.add(data, variable.name, variable.space == "const")
        for address, data, name in allocations:
            memory.add_at(address, data, name)
        params = self._pack(program.function, program, args, _Buffers(memory))
        shared = program.static_shared + shared_bytes
        stats = Stats()
        padded = -(-threads // 32) * 32
        chunk = max(1, chosen.lanes_per_chunk // padded)
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            for first in range(0, total, chunk):
                Machine(
                    program,
                    grid3,
                    block3,
                    first,
                    min(chunk, total - first),
                    memory,
                    params,
                    shared,
                    chosen,
                    stats,
                ).run()
        stats.seconds = time.perf_counter() - start
        self.stats = stats
        return stats

    @staticmethod
    def _pack(
        function: Function, program: Program, args: Sequence[Any], buffers: _Buffers
    ) -> bytes:
        params = function.params
        missing = params[len(args) :]
        # Triton appends pointers to scratch memory; a kernel that uses them faults on null.
        if len(args) > len(params) or len(missing) > 2 or any(p.type.bits != 64 for p in missing):
            raise LaunchError(f"{function.name} takes {len(params)} arguments, not {len(args)}")
        packed = bytearray(program.param_bytes)
        for k, (param, value) in enumerate(zip(params, args, strict=False)):
            at = program.params[param.name]
            if hasattr(value, "untyped_storage") or isinstance(value, np.ndarray):
                if param.type.bits != 64:
                    raise LaunchError(
                        f"{function.name}: argument {k} is an array, "
                        f"the parameter is .{param.type.name}"
                    )
                struct.pack_into("<Q", packed, at, buffers.pointer(value, f"argument {k}"))
            elif isinstance(value, (bytes, bytearray)):
                packed[at : at + param.nbytes] = value
            else:
                name = param.type.name
                if name[0] in "usb":
                    value = int(value) & (2**param.type.bits - 1)
                    name = f"u{param.type.bits}"
                struct.pack_into(f"<{_SCALAR[name]}", packed, at, value)
        return bytes(packed)


def load(text: str, **options: Any) -> Module:
    """Parse PTX; keyword arguments set ``Options`` for every launch."""
    return Module(text, Options(**options))


def launch_triton(compiled: Any, grid: Dim, args: Sequence[Any], **options: Any) -> Stats:
    """Run a kernel that ``triton.compile`` made; ``args`` without the constexprs."""
    meta = compiled.metadata
    return load(compiled.asm["ptx"], **options).launch(
        meta.name, grid, meta.num_warps * 32, args, meta.shared
    )
