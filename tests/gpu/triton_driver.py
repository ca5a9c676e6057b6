"""A driver for Triton that stands in for a GPU: kernels are compiled for one, as its launcher would
compile them, and executed in a functional simulator of PTX, or only recorded.

    with on_gpu(SimulatedGPU("sm_80", execute=simulate)) as gpu:
        llmcore.ops.rms_norm(x)             # CPU tensors
    gpu.launches                            # what was compiled and run, in order

So every call of an op is a launch: nothing needs to be said twice about signatures, constexprs,
grids or which pointers are divisible by 16. The process must not have TRITON_INTERPRET set when it
imports triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from llmcore import device, dispatch
from llmcore.dispatch import REGISTRY, Op

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""What the kernels are compiled for, ahead of time."""

SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Shared memory that one block may have (CUDA programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel as `module.function`, what triton.compile made of it, its grid, its
    arguments without those that were compiled in, and the constexprs among those by name."""

    kernel: str
    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class SimulatedGPU:
    """Triton's active driver: says what it is, and hands each launch to `execute`, if given."""

    name: str = "sm_80"
    execute: Callable[[Launch], Any] | None = None
    launches: list[Launch] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: object) -> int:
        return 0

    @property
    def utils(self) -> SimpleNamespace:
        """What triton asks of a driver when it loads a binary."""
        return SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[self.name]},
            load_binary=lambda *args: (None, None, 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What runs a compiled kernel: (grid, ..., arguments of the function, constexprs too)."""
        kinds = tuple(source.signature.values())
        function, names = source.fn.fn, source.fn.arg_names
        constants = {names[p[0]]: v for p, v in source.constants.items() if len(p) == 1}
        kernel = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"

        def run(*call: Any) -> None:
            grid, arguments = call[:3], tuple(passed(kinds, call[-len(kinds) :]))
            launch = Launch(kernel, self.compiled(source, metadata), grid, arguments, constants)
            self.launches.append(launch)
            if self.execute is not None:
                self.execute(launch)

        return run

    def compiled(self, source: Any, metadata: Any) -> Any:
        """The compiled kernel that a launcher is for: the one in the function's own cache."""
        caches = source.fn.device_caches[self.name][0].values()
        return next(kernel for kernel in caches if kernel.metadata == metadata)


def passed(kinds: tuple[Any, ...], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments that a compiled kernel takes: not the constexprs, tuples one by one."""
    for kind, argument in zip(kinds, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from passed(kind, argument)
        elif kind != "constexpr":
            yield argument


@contextlib.contextmanager
def on_gpu(gpu: SimulatedGPU) -> Iterator[SimulatedGPU]:
    """Inside, Triton is every op's backend, for CPU tensors, and `gpu` is its driver."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: there is nothing to compile in its interpreter"
        )

    def runs_here(op: Op) -> tuple[dispatch.Candidate, ...]:
        return tuple(replace(c, machine="") if c.backend == "triton" else c for c in op.candidates)

    before = {op: op.candidates for op in REGISTRY.values()}
    is_interpreted = device.triton_is_interpreted
    device.triton_is_interpreted = lambda: True  # which is what lets a CPU tensor in
    triton.runtime.driver.set_active(gpu)
    try:
        for op in before:
            op.candidates = runs_here(op)
            op.chosen.clear()
        with dispatch.use("triton"):
            yield gpu
    finally:
        device.triton_is_interpreted = is_interpreted
        triton.runtime.driver._active = None
        for op, candidates in before.items():
            op.candidates = candidates
            op.chosen.clear()
