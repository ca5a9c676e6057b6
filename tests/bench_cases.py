"""What the benchmarks' tests share: tiny cases, and settings that take next to no time."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator

import pytest

from llmcore import native
from llmcore.benchmarks import (
    cases,
    contest,
    roofline,
    shapes,
)
from llmcore.benchmarks import timing as times

Contender, Plan, Timing = times.Contender, times.Plan, times.Timing
PLAN = Plan(warm_up=0.0, turn=1e-5, total=0.0, fewest_rounds=2, most_rounds=2)
SETTINGS = contest.Settings(PLAN, compile=False)
OPS = sorted(cases.benches())

needs_native = pytest.mark.skipif(native.module is None, reason=native.why_not)


@pytest.fixture(autouse=True)
def little_to_collect() -> Iterator[None]:
    """A collection before each timing walks over all modules: 0.2 s each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The roofline's probes, with next to nothing to do."""
    monkeypatch.setattr(roofline, "CHAIN_ROUNDS", 100)
    monkeypatch.setattr(roofline, "SMALL_BYTES", 1 << 12)
    monkeypatch.setattr(roofline, "CHOOSING", PLAN)
    monkeypatch.setattr(roofline, "SIZES", {"L1": 1 << 12})


def small(op: str) -> cases.Bench:
    """An op's bench with its tiny shape alone."""
    bench = cases.benches()[op]
    modes = bench.shapes[0].modes
    return dataclasses.replace(bench, shapes=(dataclasses.replace(bench.tiny, modes=modes),))


def small_case(op: str, mode: str = shapes.FORWARD, dtype: str = "fp32") -> cases.Case:
    bench = small(op)
    return cases.Case(bench, bench.shapes[0], dtype, mode)
