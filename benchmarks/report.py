"""Results as lines in the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .contest import DEFINITION, OTHERS, OURS, TORCH, Entry, Result
from .overhead import STATES, Cost
from .roofline import Limit
from .table import Line

FORMAT = 2
"""Of the JSON; goes up when a field changes its meaning."""


class JsonFile:
    """What can be written as JSON."""

    def as_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def write(self, path: Path) -> None:
        """As JSON; makes the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


@dataclasses.dataclass
class Report(JsonFile):
    """Everything that one run measured."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    roofline: list[Limit] = dataclasses.field(default_factory=list)
    results: list[Result] = dataclasses.field(default_factory=list)
    overhead: list[Cost] = dataclasses.field(default_factory=list)
    table: list[Line] = dataclasses.field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(result.failed for result in self.results)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "roofline": [dataclasses.asdict(limit) for limit in self.roofline],
            "cases": [case_json(result) for result in self.results],
            "overhead": [dataclasses.asdict(cost) for cost in self.overhead],
            "table": [line.as_json() for line in self.table],
        }


def case_json(result: Result) -> dict[str, Any]:
    """Seconds, bytes and operations are plain; rates are in 1e9 a second."""
    case, work = result.case, result.case.work
    return {
        "op": case.bench.op,
        "model": case.shape.model,
        "shape": case.shape.label,
        "dtype": case.dtype,
        "mode": case.mode,
        "threads": result.threads,
        "bytes": work.bytes,
        "flops": work.flops,
        "bound": work.bound,
        "limit": result.limit,
        "limit_rate": None if result.rate is None else result.rate / 1e9,
        "waited": result.waited,
        "contenders": [entry_json(result, entry) for entry in result.entries],
    }


def entry_json(result: Result, entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name, "side": entry.side}
    if entry.error is not None and entry.error != math.inf:
        found["error_in_bounds"] = entry.error
    if entry.note:
        found["note"] = entry.note
    if entry.timing is None:
        return {**found, "not_timed": entry.why_not}
    low, high = entry.timing.quartiles
    return {
        **found,
        "seconds": entry.timing.median,
        "quartiles": [low, high],
        "rounds": len(entry.timing.seconds),
        "calls_each": entry.timing.calls,
        "gb_per_s": result.case.work.bytes / entry.seconds / 1e9,
        "gflop_per_s": result.case.work.flops / entry.seconds / 1e9,
        "share_of_limit": result.share(entry),
        "against_torch": result.against_torch(entry),
        "extra_bytes": entry.extra,
    }


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def mebibytes(size: int | None) -> str:
    """What a contender holds beyond its results."""
    return "?" if size is None else f"{size / (1 << 20):.1f}"


def headline(result: Result) -> str:
    """What a case needs, and what bounds it."""
    work = result.case.work
    need = f"{work.amount / 1e9:.3g} {work.unit.removesuffix('/s')}"
    if result.rate is None:
        return f"    {need}; limit unknown: {result.limit}"
    line = f"    {need}; limit: {result.limit}, {result.rate / 1e9:.1f} {work.unit}"
    if result.is_noisy and result.waited is not None:
        line += f"; NOISY: threads waited for a core, {100 * result.waited:.0f} % of the time"
    return line


def case_lines(result: Result) -> Iterator[str]:
    """For each contender: ms (quartiles), rate, share of the limit, extra memory, against torch."""
    yield headline(result)
    for entry in result.entries:
        if entry.timing is None:
            word = "FAILED" if entry.side == OURS and entry.error is not None else "not timed"
            yield f"    {entry.name:<26}{word}: {entry.why_not}"
            continue
        low, high = map(milliseconds, entry.timing.quartiles)
        rate = result.case.work.amount / entry.seconds / 1e9
        share, ratio = result.share(entry), result.against_torch(entry)
        line = f"    {entry.name:<26}{milliseconds(entry.seconds):>8} ms {f'({low}-{high})':<17}"
        line += f"{rate:>8.1f} {result.case.work.unit:<8}"
        line += "" if share is None else f"{100 * share:>5.0f} %"
        line += f"{mebibytes(entry.extra):>9} MiB"
        line += f"{ratio:>8.2f}x torch" if entry.side == OURS and ratio is not None else ""
        yield line + (f"  [{entry.note}]" if entry.note else "")


TABLE_TITLE = (
    f"{'':<53}{'ours':>10}{'torch':>10}{'ratio':>8}{'eager':>8}{'of limit':>10}"
    f"{'MiB ours':>10}{'torch':>8}  {'to reach':<17}reached  torch's best; others"
)


def table_line(line: Line) -> str:
    """A row of the table in one line; `?` is for what is not known."""
    result, ours, best = line.result, line.ours, line.result.best(TORCH)
    torchs = f"{milliseconds(best.seconds) if best else '?':>7} ms"
    if ours is None:
        reasons = (entry.why_not for entry in result.entries if entry.side == OURS)
        return f"{line.row.name:<53}{'-':>10}{torchs}  not timed: {'; '.join(reasons)}"
    share = result.share(ours)
    ratios = (result.against_torch(ours, eager=eager) for eager in (False, True))
    cells = (
        f"{milliseconds(ours.seconds):>7} ms",
        torchs,
        *(f"{'?' if ratio is None else f'{ratio:.2f}x':>8}" for ratio in ratios),
        f"{'?' if share is None else f'{100 * share:.0f} %':>10}",
        f"{mebibytes(ours.extra):>10}{mebibytes(best.extra if best else None):>8}",
        f"  {line.goal!s:<17}{'?' if line.misses is None else 'NO' if line.misses else 'yes':<9}",
    )
    timed = [entry for entry in result.entries if entry.side == OTHERS and entry.timing]
    others = [f"{entry.name} {milliseconds(entry.seconds)} ms" for entry in timed]
    names = "; ".join([best.name if best else "?", *others])
    return f"{line.row.name:<53}{''.join(cells)}{names}{'  NOISY' if result.is_noisy else ''}"


def table_summary(lines: Sequence[Line]) -> Iterator[str]:
    """How many rows reach their figures on each number of threads."""
    for threads in dict.fromkeys(line.result.threads for line in lines):
        mine = [line.misses for line in lines if line.result.threads == threads]
        unknown = mine.count(None)
        yield (
            f"  {on_threads(threads)}: {mine.count([])} of {len(mine)} rows reach their figures"
            + (f", {unknown} unknown" if unknown else "")
        )


def roofline_lines(limits: Sequence[Limit]) -> Iterator[str]:
    """One line for each probe, a column for each number of threads."""
    threads = sorted({limit.threads for limit in limits})
    rates = {(limit.name, limit.threads): limit for limit in limits}
    yield f"    {'':<34}" + "".join(f"{on_threads(n):>24}" for n in threads)
    for name in dict.fromkeys(limit.name for limit in limits):
        cells = [rates.get((name, n)) for n in threads]
        texts = [f"{c.rate:.1f} ({c.low:.1f}-{c.high:.1f})" if c else "-" for c in cells]
        unit = next(c.unit for c in cells if c)
        yield f"    {name:<34}" + "".join(f"{text:>24}" for text in texts) + f"  {unit}"


def overhead_lines(costs: Sequence[Cost]) -> Iterator[str]:
    """One line for each way into an op, a column for each of torch's states."""
    yield f"    {'microseconds a call':<34}" + "".join(f"{state:>22}" for state in STATES)
    found = {(c.op, c.way, c.state): c for c in costs}
    for op, way in dict.fromkeys((c.op, c.way) for c in costs):
        cells = [found.get((op, way, state)) for state in STATES]
        texts = [f"{c.microseconds:.1f} ({c.low:.1f}-{c.high:.1f})" if c else "-" for c in cells]
        yield f"    {way + (f' ({op})' if op not in way else ''):<34}" + "".join(
            f"{text:>22}" for text in texts
        )


def summary_lines(results: Sequence[Result]) -> Iterator[str]:
    """Where llmcore is the faster, and every case where torch is, or where something is missing."""
    noisy = sum(result.is_noisy for result in results)
    if noisy:
        yield f"  NOISY: in {noisy} of {len(results)} cases threads waited for a core"
    for op in dict.fromkeys(result.case.bench.op for result in results):
        mine = [r for r in results if r.case.bench.op == op]
        ratios = {r: ratio for r in mine if (ratio := best_ratio(r)) is not None}
        wins = sum(ratio >= 1 for ratio in ratios.values())
        yield f"  {op}: llmcore is the faster in {wins} of {len(ratios)} cases" + (
            f", {min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x torch's best"
            if ratios
            else ""
        )
        for result, ratio in sorted(ratios.items(), key=lambda pair: pair[1]):
            best = result.best(TORCH)
            if ratio < 1 and best is not None:
                yield f"    LOSES: {place(result)}: {ratio:.2f}x {best.name}"
        reasons: dict[tuple[str, str], list[str]] = {}
        for result in mine:
            for entry in result.entries:
                if entry.timing is None and entry.side in (OURS, DEFINITION):
                    reasons.setdefault((entry.name, entry.why_not), []).append(place(result))
        for (name, why), places in reasons.items():
            others = f" and {len(places) - 1} more" if len(places) > 1 else ""
            yield f"    NOT TIMED: {name}: {why} ({places[0]}{others})"


def on_threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def place(result: Result) -> str:
    noisy = " (noisy)" if result.is_noisy else ""
    return f"{result.case.label}, {on_threads(result.threads)}{noisy}"


def best_ratio(result: Result) -> float | None:
    """How many times as fast as torch's best llmcore's best is."""
    ours = result.best(OURS)
    return None if ours is None else result.against_torch(ours)
