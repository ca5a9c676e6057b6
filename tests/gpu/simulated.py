"""CUDA launchers on a machine without a GPU: their host code runs as it is, down to a runtime that
hands each kernel's PTX to the simulator.

Tensors lie apart in a memory of their own, so that an access outside of one reaches no other;
inputs are read-only, outputs and scratch memory start as NaN.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import native_structs
import numpy as np
import nvcc
import ptxsim
import torch
from kernel_counts import Recorder, digest

SPACE = 1 << 28
GAP = 1 << 16
SIMULATE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of csrc/ops.h's Dtype."""

executed = Recorder()
"""What was simulated of the CUDA kernels."""


def plain_name(kernel: str) -> str:
    """norm_forward_kernel of its mangled name."""
    found = re.match(r"_ZN7llmcore4cuda(?:\d+_GLOBAL__N_\w+?)?(\d+)", kernel)
    return kernel[found.end() : found.end() + int(found.group(1))] if found else kernel


class Library:
    """The launchers of some ops, linked with the runtime that simulates a GPU of a capability."""

    def __init__(
        self, ops: Sequence[str], edits: Sequence[nvcc.Edit] = (), capability: int = 80
    ) -> None:
        hosts = nvcc.hosts(ops, edits)
        self.texts = [host.ptx for host in hosts.values()]
        self.modules: dict[str, ptxsim.Module] = {}
        runtime = nvcc.ROOT / "tests" / "gpu" / "runtime.cpp"
        objects = [str(host.object) for host in hosts.values()]
        parts = "\0".join([runtime.read_text(), *objects])
        target = nvcc.CACHE / f"{hashlib.sha256(parts.encode()).hexdigest()[:24]}.so"
        if not target.exists():
            command = ["g++", "-std=c++17", "-shared", "-fPIC", str(runtime), *objects]
            subprocess.run([*command, "-o", str(target)], check=True)
        self.library = ctypes.CDLL(str(target))
        self.options: dict[str, Any] = {}
        self.geometry: dict[str, tuple[int, int]] = {}  # by kernel: threads, dynamic shared bytes
        self.stats: list[tuple[str, ptxsim.Stats]] = []
        self.memory = Memory()
        self.last = ""  # the kernel launched last
        self._failure: BaseException | None = None
        self._simulate = SIMULATE(self._run)  # kept alive: C calls it
        self.capability = capability

    def _module(self, kernel: str) -> ptxsim.Module:
        if kernel not in self.modules:
            text = next(text for text in self.texts if f".entry {kernel}(" in text)
            module = ptxsim.load(text)
            self.modules |= dict.fromkeys(module.kernels, module)
        return self.modules[kernel]

    def _run(self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int) -> int:
        try:
            kernel = name.decode()
            self.last = f"cuda {plain_name(kernel)}"
            module = self._module(kernel)
            params = module.ptx.functions[kernel].params
            values = [
                ctypes.string_at(arguments[i], param.nbytes) for i, param in enumerate(params)
            ]
            stats = module.launch(
                kernel,
                tuple(grid.contents),
                tuple(block.contents),
                values,
                shared,
                self.memory.allocations,
                **self.options,
            )
            launch = digest(kernel, tuple(grid.contents), tuple(block.contents), values)
            executed.add(self.last, launch, stats.instructions)
            self.stats.append((kernel, stats))
            self.geometry[kernel] = (int(np.prod(tuple(block.contents))), shared)
            return 0
        except BaseException as error:
            self._failure = error
            return 1

    def call(self, function: str, struct: str, fields: dict[str, Any], *, scratch: bool) -> None:
        """function(struct(fields), scratch memory if it takes some, stream); raises its fault."""
        # Each time: another Library of the same launchers shares the code, and so its variables.
        self.library.set_simulator(self._simulate, self.capability)
        op = native_structs.struct(struct)()
        fill(op, fields)
        kind = f"RKNS_{len(struct)}{struct}E"
        extra: list[Any] = []
        if scratch:
            need = self._function(f"{function}_workspace", kind)
            need.restype = ctypes.c_size_t
            place, _ = self.memory.fresh(need(ctypes.byref(op)), f"{function}'s scratch")
            extra = [ctypes.c_void_p(place)]
        launcher = self._function(function, f"{kind}{'Pv' if scratch else ''}P11CUstream_st")
        status = launcher(ctypes.byref(op), *extra, None)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        assert status == 0, f"{function} returned {status}"

    def _function(self, name: str, arguments: str) -> Any:
        return getattr(self.library, f"_ZN7llmcore4cuda{len(name)}{name}E{arguments}")


def fill(struct: ctypes.Structure, fields: dict[str, Any]) -> None:
    """Sets fields; a dict fills a struct inside, a sequence an array, None is a null pointer."""
    for name, value in fields.items():
        if isinstance(value, dict):
            fill(getattr(struct, name), value)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                getattr(struct, name)[i] = part
        else:
            setattr(struct, name, value)


class Memory:
    """Device memory: buffers that lie far apart, at addresses that pointers in structs can hold."""

    def __init__(self) -> None:
        self.space = np.empty(SPACE, np.uint8)
        self.start = self.space.__array_interface__["data"][0]
        self.clear()

    def clear(self) -> None:
        self.allocations: list[tuple[int, np.ndarray, str]] = []
        self.next = GAP

    def fresh(self, size: int, name: str, skew: int = 0) -> tuple[int, np.ndarray]:
        """(address, bytes) of a buffer full of NaN, `skew` bytes behind a multiple of 256."""
        at = -(-(self.start + self.next) // 256) * 256 - self.start + skew
        buffer = self.space[at : at + size]
        assert buffer.size == size, "the simulated memory is too small for this test"
        buffer[:] = 0xFF
        self.next = at + size + GAP
        self.allocations.append((self.start + at, buffer, name))
        return self.start + at, buffer

    def output(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> torch.Tensor:
        """A contiguous tensor of NaN that kernels may write."""
        size = int(np.prod(shape)) * dtype.itemsize
        return torch.from_numpy(self.fresh(size, name)[1]).view(dtype).reshape(tuple(shape))

    def input(self, tensor: torch.Tensor | None, name: str, skew: int = 0) -> torch.Tensor | None:
        """The tensor, its strides kept, where kernels may read it; NaN in the gaps."""
        if tensor is None:
            return None
        tensor = tensor.detach()
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        extent = extent if tensor.numel() else 0
        _, buffer = self.fresh(extent * tensor.itemsize, name, skew)
        place = torch.from_numpy(buffer).view(tensor.dtype)
        copy = place.as_strided(tensor.shape, tensor.stride()) if extent else tensor
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        copy[once].copy_(tensor[once])
        locked = buffer.view()
        locked.flags.writeable = False
        self.allocations[-1] = (self.allocations[-1][0], locked, name)
        return copy


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
