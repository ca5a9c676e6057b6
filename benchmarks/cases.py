"""What is timed: a bench for each op, its peers, and the cases (shape, dtype, mode) that it has."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import llmcore.benchmarks
from llmcore.ops.sample import Draw, Sample

from .shapes import BACKWARD, BOTH, FORWARD, MODES, Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What a call needs at least: bytes moved, each tensor once, and floating-point operations.

    `bound` is what limits it: "copy", "read" (bytes) or "fma" (operations).
    """

    bytes: int
    flops: int
    bound: str

    @property
    def amount(self) -> int:
        """In the unit of the bound."""
        return self.flops if self.bound == "fma" else self.bytes

    @property
    def unit(self) -> str:
        return "GFLOP/s" if self.bound == "fma" else "GB/s"


@dataclass(frozen=True)
class Peer:
    """A call that one has without llmcore; it takes the arguments of llmcore's function.

    `into` takes `out=` besides; without it the peer makes a fresh result in that mode too, and the
    table says so. `prepare` makes other arguments of them before anything is timed (packs a weight
    as the peer wants it); such a peer has no gradient. `is_compiled`: by torch.compile, which takes
    seconds at the first call; in quick runs it is in fewer modes. `is_torch` is False for another
    library's call, which is shown and is no part of "torch's best"; `rest` is how many seconds its
    threads get to fall asleep after a turn: awake they would slow down whoever is next.
    """

    name: str
    call: Callable[..., Any]
    into: Callable[..., Any] | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None
    modes: tuple[str, ...] = (*MODES, BOTH)
    quick_modes: tuple[str, ...] = (*MODES, BOTH)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    is_compiled: bool = False
    is_torch: bool = True
    rest: float = 0.0

    def takes(self, dtype: str, mode: str, is_quick: bool) -> bool:
        invited = mode in self.modes and (not is_quick or mode in self.quick_modes)
        return invited and dtype in self.dtypes


def compiled(name: str, function: Callable[..., Any]) -> Peer:
    """`function` by torch.compile (inductor); the graph itself writes into `out`."""

    def into(*args: Any, out: Any, **options: Any) -> Any:
        results = function(*args, **options)
        if not isinstance(results, tuple):
            return out.copy_(results)
        return tuple(o.copy_(result) for o, result in zip(out, results, strict=True))

    make = functools.partial(torch.compile, dynamic=False)
    quick = (FORWARD, BACKWARD)
    return Peer(f"compiled {name}", make(function), make(into), quick_modes=quick, is_compiled=True)


@dataclass(frozen=True)
class Bench:
    """An op's benchmark.

    `sample` draws the op's arguments for a shape; `work` says what a call needs, given the bytes of
    an element and the mode; `peers` are made anew for each case; `tiny` is the shape for the cost
    of a call; `results` is how many tensors a call gives.
    """

    op: str
    shapes: tuple[Shape, ...]
    tiny: Shape
    sample: Callable[[Any, Draw], Sample]
    work: Callable[[Any, int, str], Work]
    peers: Callable[[Any], list[Peer]]
    results: int = 1


@dataclass(frozen=True)
class Case:
    """One shape of a bench in one dtype and mode."""

    bench: Bench
    shape: Shape
    dtype: str
    mode: str

    @property
    def label(self) -> str:
        return f"{self.bench.op} {self.shape.label} {self.dtype} {self.mode}"

    @property
    def work(self) -> Work:
        return self.bench.work(self.shape, DTYPES[self.dtype].itemsize, self.mode)


def cases(bench: Bench, dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:
    """Every case of a bench, or those of its quick shapes."""
    for shape in bench.shapes:
        if quick and not shape.quick:
            continue
        for dtype in dtypes:
            for mode in shape.modes:
                yield Case(bench, shape, dtype, mode)


def benches() -> dict[str, Bench]:
    """Every bench by its op, found by the names of the files."""
    found = {}
    for module in pkgutil.iter_modules(llmcore.benchmarks.__path__):
        if module.name.startswith("bench_"):
            loaded = importlib.import_module(f"llmcore.benchmarks.{module.name}")
            bench = getattr(loaded, "BENCH", None)  # bench_generate.py is of whole models
            if bench is not None:
                found[bench.op] = bench
    return found
