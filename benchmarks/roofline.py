"""What this machine can do at most: multiply-adds in registers, reads and copies.

The probes are native (csrc/cpu/roofline.cpp) and share nothing with the ops' kernels. A copy counts
the bytes read and the bytes written, into memory that was used before; stores that pass by the
caches are tried too, and torch's copy_, and the fastest way counts. The multiply-adds are the best
level's, and bfloat16's limit is that of the dot-product instruction where the CPU has one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmcore import native
from llmcore.models.plan import into_huge_pages

from .timing import Contender, Plan, Timing, measure

CHOOSING = Plan(warm_up=0.01, turn=0.002, total=0.06, fewest_rounds=3, most_rounds=20)
CHAIN_ROUNDS = 1_000_000
"""About 3 ms: far more than it takes to wake a thread."""

BF16_PEAK = "bf16 dot-product peak"

SMALL_BYTES = 32 << 20
"""What a probe moves in one call at least, in several passes, so that the call costs nothing."""

SIZES = {"L1": 16 << 10, "L2": 256 << 10, "L3": 4 << 20, "memory": 128 << 20}
"""Bytes for each thread that fit into a level of the caches of today's CPUs, or into none."""


@dataclass(frozen=True)
class Probe:
    """A call that does `amount` bytes (or operations) of work as fast as this machine can.

    A peak is a constant of the machine: its fastest turn counts. Memory is shared with others and
    its speed drifts: the median counts, taken in turn with those that it is the limit of.
    """

    name: str
    call: Callable[[], Any]
    amount: float
    is_peak: bool = False

    def contender(self) -> Contender:
        return Contender(self.name, self.call)

    def rate(self, timing: Timing) -> float:
        """Bytes or operations a second."""
        return self.amount / (min(timing.seconds) if self.is_peak else timing.median)


def raw(name: str) -> Callable[..., Any]:
    """A probe's raw op at the best level; only to be called where there are native kernels."""
    return functools.partial(getattr(torch.ops.llmcore_roofline, name).default, native.BEST_LEVEL)


def results() -> torch.Tensor:
    return torch.empty(torch.get_num_threads())


def fma() -> Probe:
    """float32 multiply-adds on all of torch's threads."""
    result = results()
    call = functools.partial(raw("fma"), CHAIN_ROUNDS, result)
    return Probe("FMA peak", call, call(), is_peak=True)


def bf16_pairs() -> Probe | None:
    """bfloat16 dot products on all threads; None where the CPU has no instruction for them."""
    result = results()
    call = functools.partial(raw("bf16_pairs"), CHAIN_ROUNDS, result)
    operations = call()
    if operations == 0:
        return None
    return Probe(BF16_PEAK, call, operations, is_peak=True)


def peak(dtype: torch.dtype) -> Probe:
    """The arithmetic limit of products in `dtype`, summed in float32."""
    pairs = bf16_pairs() if dtype == torch.bfloat16 else None
    return pairs or fma()


def buffers(size: int, sets: int) -> list[torch.Tensor]:
    """`sets` used float32 buffers of `size` bytes each."""
    return [torch.ones(max(size // 4, 64)) for _ in range(sets)]


def passes_over(size: int, sets: int) -> int:
    return max(1, SMALL_BYTES // max(size, 1)) if sets == 1 else 1


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """A call that does the next of `calls` each time."""
    if len(calls) == 1:
        return calls[0]
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def read(size: int, sets: int = 1, *, huge_pages: bool = False) -> Probe:
    """Reading `size` bytes; of several sets, the next one at each call.

    In the pages that torch's tensors lie in, unless all of it is moved into huge ones.
    """
    result, passes, sources = results(), passes_over(size, sets), buffers(size, sets)
    if huge_pages:
        into_huge_pages(sources)
    calls: list[Callable[[], Any]] = [
        functools.partial(raw("read"), x, passes, result) for x in sources
    ]
    return Probe("read", in_turn(calls), sources[0].nbytes * passes)


def copies(size: int, sets: int) -> Iterator[Probe]:
    """Each way to copy that moves `size` bytes, half of them read and half written."""
    passes = passes_over(size, sets)
    sources, targets = buffers(size // 2, sets), buffers(size // 2, sets)
    pairs = list(zip(sources, targets, strict=True))
    amount = 2 * sources[0].nbytes * passes
    for name, past_caches in (("copy", False), ("copy past the caches", True)):
        calls: list[Callable[[], Any]] = [
            functools.partial(raw("copy"), x, passes, past_caches, y) for x, y in pairs
        ]
        yield Probe(name, in_turn(calls), amount)
    if passes == 1:
        yield Probe("copy_", in_turn([functools.partial(y.copy_, x) for x, y in pairs]), amount)


def copy(size: int, sets: int = 1) -> Probe:
    """The fastest way to copy."""
    ways = list(copies(size, sets))
    timings = measure([way.contender() for way in ways], CHOOSING)
    return min(zip(timings, ways, strict=True), key=lambda pair: pair[0].median)[1]


def limit(bound: str, dtype: torch.dtype, size: int, sets: int) -> Probe:
    """The probe that bounds an op: by "copy" or "read" of `size` bytes, or by "fma"."""
    if bound == "fma":
        return peak(dtype)
    return copy(size, sets) if bound == "copy" else read(size, sets)


@dataclass(frozen=True)
class Limit:
    """A line of the roofline: 1e9 bytes or operations a second, and the quartiles of its turns."""

    name: str
    unit: str
    threads: int
    rate: float
    low: float
    high: float


def matmul(dtype: torch.dtype) -> Probe:
    """torch's product of two 1024 x 1024 matrices: no limit, but what a library reaches of it."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    out = torch.empty_like(a)
    name = "torch.matmul 1024^3 " + ("fp32" if dtype == torch.float32 else "bf16")
    return Probe(name, functools.partial(torch.mm, a, b, out=out), 2 * 1024**3)


def measure_limits(threads: int, plan: Plan) -> list[Limit]:
    """The roofline on so many threads; each kind's probes take turns."""
    torch.set_num_threads(threads)
    arithmetic = [p for p in (fma(), bf16_pairs()) if p is not None]
    arithmetic += [matmul(torch.float32), matmul(torch.bfloat16)]
    found = list(_limits(arithmetic, "GFLOP/s", threads, plan))
    for level, size in SIZES.items():
        whole = size * threads
        memory = [read(whole), *copies(whole, 1)]
        named = [Probe(f"{p.name}, {level}", p.call, p.amount) for p in memory]
        found += _limits(named, "GB/s", threads, plan)
    return found


def _limits(probes: list[Probe], unit: str, threads: int, plan: Plan) -> Iterator[Limit]:
    timings = measure([p.contender() for p in probes], plan)
    for probe, timing in zip(probes, timings, strict=True):
        fast, slow = timing.quartiles
        low, high = (probe.amount / seconds / 1e9 for seconds in (slow, fast))
        yield Limit(probe.name, unit, threads, probe.rate(timing) / 1e9, low, high)
