"""`llmcore bench --device cuda`: the same cases on a GPU, verified, then timed by CUDA events.

A turn is many calls queued one behind another between two events, so that launching is hidden; the
contenders take turns. No probe measures this GPU's limits: rates are absolute.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmcore import device, gpu_table
from llmcore.dispatch import REGISTRY, BackendError
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import verify_sample

from . import machine
from .cases import DTYPES, Case, benches, cases
from .contest import OURS, Entry, Ready, Settings, line_up
from .timing import QUICK, turns

BACKENDS = ("cuda", "triton")
CALLS, ROUNDS = 20, 15


@dataclass(frozen=True)
class Line:
    """What became of one contender: seconds, or the reason why there are none."""

    name: str
    seconds: float | None = None
    why_not: str = ""


Timer = Callable[[Callable[[], Any], int], float]
"""Seconds for each of so many calls."""


@dataclass(frozen=True, eq=False)
class PlacedSample(Sample):
    """A sample whose tensors are somewhere, unless another place is asked for."""

    place: str = "cuda"

    def cast(
        self, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        return super().cast(dtype, self.place if device is None else device)


def shapes_of(case: Case, place: str = "cuda") -> str:
    """The case's class of shapes in the table of what was measured on GPUs."""
    args, options = case.bench.sample(case.shape, Draw(0)).cast(DTYPES[case.dtype], place)
    op = REGISTRY[case.bench.op]
    return op.shapes(*op.arguments(*args, **options))


def by_events(call: Callable[[], Any], calls: int) -> float:
    """By two events around the calls, which wait for nothing in between."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def why_wrong(case: Case, ready: Ready, sample: PlacedSample) -> str:
    """What the yardstick says against a backend of ours; empty when it passes."""
    if ready.side != OURS:
        return ""
    op, backend = REGISTRY[case.bench.op], ready.name.removeprefix("llmcore ")
    try:
        verdicts = verify_sample(op, sample, DTYPES[case.dtype], backend, sample.place)
    except BackendError as error:
        return str(error)
    failed = [name for name, verdict in verdicts.items() if not verdict.passed]
    return f"fails the yardstick in {', '.join(failed)}" if failed else ""


def hold(
    case: Case, place: str = "cuda", timer: Timer = by_events, ours: tuple[str, ...] = BACKENDS
) -> list[Line]:
    """Every contender of a case."""
    drawn = case.bench.sample(case.shape, Draw(0))
    sample = PlacedSample(drawn.name, drawn.args, drawn.options, drawn.keep, place)
    lines: list[Line] = []
    ready_calls: list[tuple[Ready, Callable[[], Any]]] = []
    for ready in line_up(case, Settings(QUICK, ours, compile=False, quick=True)):
        if isinstance(ready, Entry):
            lines.append(Line(ready.name, why_not=ready.why_not))
            continue
        why = why_wrong(case, ready, sample)
        try:
            if not why:
                with ready.context():
                    call = ready.make(sample, DTYPES[case.dtype])
                    call()
                ready_calls.append((ready, call))
                continue
        except (RuntimeError, NotImplementedError, TypeError) as error:  # a peer of the CPU's only
            why = f"{type(error).__name__}: {error}"
        lines.append(Line(ready.name, why_not=why))
    return lines + take_turns(ready_calls, timer)


def take_turns(calls: list[tuple[Ready, Callable[[], Any]]], timer: Timer) -> list[Line]:
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS):
        for i in turns(len(calls), number):
            ready, call = calls[i]
            with ready.context():
                seconds[i].append(timer(call, CALLS))
    return [
        Line(ready.name, statistics.median(times))
        for (ready, _), times in zip(calls, seconds, strict=True)
    ]


def seconds_of_ours(lines: list[Line]) -> dict[str, float]:
    """By backend, of those that were timed."""
    names = {f"llmcore {backend}": backend for backend in BACKENDS}
    return {names[x.name]: x.seconds for x in lines if x.name in names and x.seconds is not None}


def run(args: argparse.Namespace) -> int:
    """Prints a line for each contender and writes them as JSON; 2 where there is no GPU.

    With --table, which of CUDA and Triton was the faster goes into dispatch's table.
    """
    if why := device.cuda_reason():
        print(f"skipped: {why}; nothing was timed")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    wanted = [bench for op, bench in benches().items() if not args.ops or op in args.ops]
    found, failed = [], False
    times: list[tuple[str, str, dict[str, float]]] = []
    for case in (case for bench in wanted for case in cases(bench, args.dtypes, args.quick)):
        print(f"\n{case.label}: {case.shape.model}", flush=True)
        lines = hold(case)
        times.append((case.bench.op, shapes_of(case), seconds_of_ours(lines)))
        for line in lines:
            text, rate = line.why_not, None
            if line.seconds is not None:
                rate = case.work.amount / line.seconds / 1e9
                text = f"{line.seconds * 1e6:10.1f} us {rate:10.1f} {case.work.unit}"
            print(f"    {line.name:<28}{text}", flush=True)
            failed |= line.why_not.startswith("fails the yardstick")
            found.append({"case": case.label, "rate": rate, **vars(line)})
    path = args.json or machine.results_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    path.write_text(json.dumps({"machine": gpu, "results": found}, indent=1))
    print(f"\nresults: {path}")
    if args.table:
        written = gpu_table.write(torch.cuda.get_device_name(), times)
        print(f"the faster of CUDA and Triton goes first from now on: {written}")
    return 1 if failed else 0
