"""`llmcore bench generate`: tokens a second of a whole model, against those who run it too.

Decoding for one sequence after a short and after a long context, for eight at once, and reading a
prompt; llmcore in every width of weights, the others in those that they have. Everybody takes turns
on the same ids, round by round, each in a process of its own (engine_process.py), and so does the
probe of the read bandwidth in this one.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore import native

from . import contest, engines, line_up, machine, plot, roofline, timing
from .engine_process import REST, Hosted, reason
from .engines import HUGGING_FACE, LLAMA_CPP, OURS, Engine, Job
from .report import JsonFile
from .waiting import Waiting, is_disturbed
from .waiting import waits as counted

AFTER_32 = Job("decode after 32", 1, 32, 1, 16)
AFTER_1024 = Job("decode after 1024", 1, 1024, 1, 16)
EIGHT = Job("decode of 8 after 32", 8, 32, 1, 8)
PREFILL = Job("prefill of 512", 1, 0, 512, 1)
JOBS = (AFTER_32, AFTER_1024, EIGHT, PREFILL)

LLAMA_RATIOS = {"fp32": 1.0, "bf16": 1.25, "int8": 1.4, "int4": 1.3}
"""What decoding for one sequence is to reach, in times llama.cpp of the same width."""

EAGER_RATIOS = {"int8": 8.0, "int4": 11.0}
"""The same, in times Hugging Face eager in float32."""

PREFILL_RATIO = 1.5
"""Of prefill, in times the best of all peers of any width."""

OUTSIDE = 0.1
"""The part of a token's time that may pass outside of the native call."""

LIKE = 0.5
"""The correlation of an engine's logits with ours in float32 from which on it runs the same model.

It is to find wrong weights or rotations, which leave next to none, not coarse rounding: llama.cpp's
Q4_0 has 0.83 on eight rows of random ids, and is the fastest peer at four bits."""

READ_BYTES, READS = 256 << 20, 4
"""Of one call of the probe, and how many calls are a turn."""

FORMAT = 2
"""Of the JSON; goes up when a field changes its meaning."""

SHADES = {
    OURS: contest.OURS,
    HUGGING_FACE: contest.TORCH,
    LLAMA_CPP: contest.OTHERS,
    engines.OTHERS: contest.DEFINITION,
}
"""A side's colour is that of this side of plot.COLOURS."""


@dataclass(frozen=True)
class Rounds:
    """As many rounds as fit into `total` seconds for a job, within these bounds."""

    total: float = 30.0
    fewest: int = 5
    most: int = 9


QUICK = Rounds(0.0, 2, 2)


@dataclass(frozen=True)
class Speed:
    """One engine at one job: seconds of a pass by rounds, or why there are none.

    waited  the median share of a turn for which its threads waited for a core, where it is known
    """

    name: str
    side: str
    width: str
    seconds: tuple[float, ...] = ()
    why_not: str = ""
    likeness: float | None = None
    waited: float | None = None

    @property
    def median(self) -> float:
        return timing.quantile(self.seconds, 0.5) if self.seconds else float("inf")

    @property
    def is_noisy(self) -> bool:
        """Whether other programs ran on the cores in most of its turns."""
        return is_disturbed(self.waited)


@dataclass(frozen=True)
class Outcome:
    """A job: everybody's speed, and this machine's limits in the same minutes (None: unknown).

    waited  the share of the probe's reads for which its threads waited for a core
    """

    job: Job
    speeds: list[Speed]
    read: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    waited: float | None = None

    def rate(self, speed: Speed) -> float:
        """Tokens a second."""
        return self.job.tokens / speed.median

    def best(self, *sides: str, width: str | None = None, name: str = "") -> Speed | None:
        """The fastest that was timed of these sides, of a width, with a name that begins so."""
        found = [
            speed
            for speed in self.speeds
            if speed.seconds
            and speed.side in sides
            and width in (None, speed.width)
            and speed.name.startswith(name)
        ]
        return min(found, key=lambda speed: speed.median, default=None)


PEERS = (HUGGING_FACE, LLAMA_CPP, engines.OTHERS)


@dataclass(frozen=True)
class Line:
    """A row of the table: one width of ours at one job; ratios are None where a peer is missing."""

    outcome: Outcome
    ours: Speed
    share: float | None

    @property
    def peers(self) -> dict[str, Speed | None]:
        """The best of the same width, llama.cpp's best, eager float32, the best of all."""
        best, width = self.outcome.best, self.ours.width
        return {
            "peer": best(*PEERS, width=width),
            "llama.cpp": best(LLAMA_CPP, width=width),
            "HF eager": best(HUGGING_FACE, width="fp32", name="HF eager"),
            "all": best(*PEERS),
        }

    @property
    def is_noisy(self) -> bool:
        """Whether other programs disturbed ours, those it is compared with, or the reads."""
        speeds = [self.ours, *(peer for peer in self.peers.values() if peer)]
        return is_disturbed(self.outcome.waited) or any(speed.is_noisy for speed in speeds)

    def against(self, peer: Speed | None) -> float | None:
        return peer.median / self.ours.median if peer and self.ours.seconds else None

    @property
    def ratios(self) -> dict[str, float | None]:
        return {name: self.against(peer) for name, peer in self.peers.items()}

    @property
    def goals(self) -> dict[str, float]:
        """The ratios to reach."""
        job, width = self.outcome.job, self.ours.width
        if job.is_prefill:
            return {"all": PREFILL_RATIO}
        if job.batch > 1:
            return {}
        eager = {"HF eager": EAGER_RATIOS[width]} if width in EAGER_RATIOS else {}
        return {"llama.cpp": LLAMA_RATIOS[width], **eager}

    @property
    def reached(self) -> bool | None:
        """None: nothing is asked, or a peer is missing."""
        ratios = [(self.ratios[name], goal) for name, goal in self.goals.items()]
        if not ratios or any(ratio is None for ratio, _ in ratios):
            return None
        return all(ratio is not None and ratio >= goal for ratio, goal in ratios)

    def as_json(self) -> dict[str, Any]:
        outcome = self.outcome
        return {
            "job": outcome.job.name,
            "width": self.ours.width,
            "tokens_per_s": outcome.rate(self.ours),
            "share_of_limit": self.share,
            "ratios": self.ratios,
            "goals": self.goals,
            "reached": self.reached,
            "noisy": self.is_noisy,
        }


def likeness(a: Tensor, b: Tensor) -> float:
    """The correlation of two sets of logits."""
    return float(torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1])


@torch.no_grad()
def hold(job: Job, line: Sequence[Engine], vocabulary: int, rounds: Rounds) -> Outcome:
    """Everybody at one job; the first of the line is ours in float32, which the others must be."""
    ids = job.ids(vocabulary)
    speeds, ready, gold = [], [], None
    for engine in line:
        speed = Speed(engine.name, engine.side, engine.width)
        try:
            logits = engine.prepare(job, ids)
            engine.seconds()  # warm
        except Exception as error:
            speeds.append(dataclasses.replace(speed, why_not=reason(error)))
            engine.close()
            continue
        gold = logits if gold is None else gold
        like = None if logits is None or gold is None else likeness(logits, gold)
        speeds.append(dataclasses.replace(speed, likeness=like))
        if like is not None and not like >= LIKE:
            why_not = f"its logits have a correlation of {like:.3f} with llmcore's"
            speeds[-1] = dataclasses.replace(speeds[-1], why_not=why_not)
            continue
        ready.append((len(speeds) - 1, engine))
    outcome = timed(job, ready, speeds, rounds)
    for engine in line:
        engine.close()
    return outcome


def timed(
    job: Job, ready: Sequence[tuple[int, Engine]], speeds: list[Speed], rounds: Rounds
) -> Outcome:
    """The rounds; the probe of the read bandwidth is one of those who take turns."""
    has_native = native.module is not None
    read = roofline.read(READ_BYTES, huge_pages=True) if has_native else None
    seconds: list[list[float]] = [[] for _ in ready]
    waits: list[list[float]] = [[] for _ in [*ready, read]]  # the reads' are the last
    failed: dict[int, str] = {}
    reads: list[float] = []
    start, number = time.perf_counter(), 0
    with timing.no_collection():
        while number < rounds.fewest or (
            number < rounds.most and time.perf_counter() - start < rounds.total
        ):
            for i in timing.turns(len(ready) + 1, number):
                if i in failed:
                    continue
                waited = None
                if i < len(ready):
                    engine = ready[i][1]
                    try:
                        seconds[i].append(engine.seconds())
                        waited = engine.waited
                    except Exception as error:  # a process that died; the others go on
                        failed[i] = reason(error)
                elif read is not None:
                    waiting = Waiting()
                    reads += [clocked(read.call) for _ in range(READS)]
                    waited = waiting.share()
                    time.sleep(REST)
                if waited is not None:
                    waits[i].append(waited)
            number += 1
    for i, ((place, _), found) in enumerate(zip(ready, seconds, strict=True)):
        if i in failed:
            speeds[place] = dataclasses.replace(speeds[place], why_not=failed[i])
        else:
            speeds[place] = dataclasses.replace(
                speeds[place], seconds=tuple(found), waited=median_of(waits[i])
            )
    rate = read.amount / timing.quantile(reads, 0.5) if read is not None else None
    limits = peaks() if job.is_prefill and has_native else {}
    return Outcome(job, speeds, rate, limits, median_of(waits[-1]))


def median_of(shares: Sequence[float]) -> float | None:
    return timing.quantile(shares, 0.5) if shares else None


def peaks() -> dict[str, float]:
    """Operations a second in those widths that have a probe."""
    found = {}
    for width, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        probe = roofline.peak(dtype)
        found[width] = probe.amount / min(clocked(probe.call) for _ in range(20))
    return found


def clocked(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def lines_of(outcome: Outcome, ours: Sequence[Any]) -> list[Line]:
    """A line for each of our widths; its share is of the reads, of prefill of the arithmetic."""
    found = []
    speeds = {speed.name: speed for speed in outcome.speeds}
    for engine in ours:
        speed = speeds[engine.name]
        peak, need = outcome.read, engine.bytes_of(outcome.job)
        if outcome.job.is_prefill:
            peak, need = outcome.peaks.get(engine.width), engine.operations_of(outcome.job)
        share = need / speed.median / peak if peak else None
        found.append(Line(outcome, speed, share))
    return found


@dataclass(frozen=True)
class Outside:
    """A token of llmcore.generate, in seconds: all of it, and what is not the native call."""

    width: str
    step: float
    outside: float

    @property
    def share(self) -> float:
        return self.outside / self.step


TITLE = (
    f"{'tokens/s':<28}{'ours':>8}{'of limit':>10}  {'best peer of the width':<40}{'ratio':>7}"
    f"{'llama.cpp':>11}{'HF eager':>10}{'any peer':>10}  {'to reach':<30}reached"
)


def text_of(line: Line) -> str:
    outcome, peer = line.outcome, line.peers["peer"]
    named = f"{peer.name} {outcome.rate(peer):.1f}" if peer else "none"
    share = "?" if line.share is None else f"{100 * line.share:.0f} %"
    cells = {n: "?" if r is None else f"{r:.2f}x" for n, r in line.ratios.items()}
    goals = ", ".join(f"{goal:g}x {name}" for name, goal in line.goals.items()) or "-"
    word = {None: "?" if line.goals else "-", True: "yes", False: "NO"}[line.reached]
    return (
        f"{outcome.job.name + ' ' + line.ours.width:<28}{outcome.rate(line.ours):>8.1f}{share:>10}"
        f"  {named:<40}{cells['peer']:>7}{cells['llama.cpp']:>11}{cells['HF eager']:>10}"
        f"{cells['all']:>10}  {goals:<30}{word}{'  NOISY' if line.is_noisy else ''}"
    )


def everybody(outcome: Outcome) -> Iterator[str]:
    """All engines at a job, ours and others'."""
    read = "" if outcome.read is None else f"; read {outcome.read / 1e9:.1f} GB/s"
    yield f"{outcome.job.name}{read}"
    for speed in outcome.speeds:
        if not speed.seconds:
            yield f"    {speed.name:<34}not timed: {speed.why_not}"
            continue
        low, high = (outcome.job.tokens / timing.quantile(speed.seconds, q) for q in (0.75, 0.25))
        like = "" if speed.likeness is None else f"   logits {speed.likeness:.4f}"
        rate = f"{outcome.rate(speed):>8.1f} ({low:.1f}-{high:.1f})"
        noisy = f"   NOISY: waited {100 * (speed.waited or 0):.0f} %" if speed.is_noisy else ""
        yield f"    {speed.name:<34}{rate:<28}{len(speed.seconds)} rounds{like}{noisy}"


def outside_text(found: Outside) -> str:
    word = "yes" if found.share <= OUTSIDE else "NO"
    return (
        f"    {found.width:<8}{1e3 * found.step:>8.2f} ms a token, {1e3 * found.outside:.3f} ms "
        f"({100 * found.share:.1f} %) outside of the native call; at most {100 * OUTSIDE:.0f} %: "
        f"{word}"
    )


@dataclass
class Found(JsonFile):
    """Everything that one run measured."""

    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine.describe)
    outcomes: list[Outcome] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "missing": self.missing,
            "jobs": [dataclasses.asdict(outcome) for outcome in self.outcomes],
            "table": [line.as_json() for line in self.lines],
            "outside": [{**dataclasses.asdict(o), "share": o.share} for o in self.outside],
        }


def measure(found: Found, shape: str, rounds: Rounds, compiles: bool) -> None:
    """Fills `found`, printing as it goes."""
    model, tokenizer = line_up.model_of(shape)
    with line_up.place_for(shape) as folder:
        stock = line_up.stock_folder(model, tokenizer, folder)
        entries = [*line_up.ours_in(shape), *line_up.peers_of(shape, folder, stock, compiles)]
        line, found.missing = line_up.line_up(entries, Hosted)
        try:
            take_turns(found, line, model.config.vocab_size, rounds)
        finally:
            for engine in line:
                engine.end()


def take_turns(found: Found, line: Sequence[Any], vocabulary: int, rounds: Rounds) -> None:
    """The jobs, and what a token takes outside of the native call."""
    ours = [engine for engine in line if engine.side == OURS]
    for name, why in found.missing.items():
        print(f"    {name} takes no part: {why}", flush=True)
    for job in JOBS:
        outcome = hold(job, line, vocabulary, rounds)
        found.outcomes.append(outcome)
        found.lines += lines_of(outcome, ours)
        print("", *everybody(outcome), sep="\n", flush=True)
    if native.module is not None:
        print("\nA token of llmcore.generate, after 32", flush=True)
        for engine in ours:
            found.outside.append(Outside(engine.width, *engine.outside()))
            print(outside_text(found.outside[-1]), flush=True)


def run(args: argparse.Namespace, threads: int) -> int:
    """The command; what an interrupted run has measured is kept."""
    compiles = not (args.no_compile or args.quick)
    rounds = QUICK if args.quick else Rounds()
    found = Found({**dataclasses.asdict(rounds), "shape": args.shape, "threads": threads})
    print(f"\n{args.shape}, {threads} threads; medians (quartiles) of rounds", flush=True)
    if not counted():
        print("    this system doesn't say how long threads wait for a core: noise is not seen")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        measure(found, args.shape, rounds, compiles)
    finally:
        torch.set_num_threads(before)
        print("", TITLE, *map(text_of, found.lines), sep="\n")
        asked = [line.reached for line in found.lines if line.goals]
        unknown = asked.count(None)
        print(f"{asked.count(True)} of {len(asked)} rows reach their figures, {unknown} unknown")
        path = args.json or machine.results_file()
        found.write(path)
        print(f"\nresults: {path}")
        print(draw(found, args.plot or path.with_suffix(".png")))
    return 0


def draw(found: Found, path: Path) -> str:
    """A panel of bars for each job, everybody's tokens a second; what became of it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'llmcore[bench]')"
    outcomes = [o for o in found.outcomes if any(speed.seconds for speed in o.speeds)]
    if not outcomes:
        return "no plot: nothing was timed"
    figure, axes = pyplot.subplots(
        1, len(outcomes), figsize=(5 * len(outcomes), 5), layout="constrained", squeeze=False
    )
    for axis, outcome in zip(axes[0], outcomes, strict=True):
        timed = [speed for speed in outcome.speeds if speed.seconds]
        shades = [plot.COLOURS[SHADES[speed.side]][0] for speed in timed]
        bars = axis.barh([s.name for s in timed], [outcome.rate(s) for s in timed], color=shades)
        axis.bar_label(bars, fmt="%.0f", fontsize=6)
        axis.invert_yaxis()
        axis.tick_params(labelsize=6)
        axis.set_title(f"{outcome.job.name}, tokens/s", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot: {path}"
