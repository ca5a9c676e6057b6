"""`llmcore bench`: every op against what one has without it, and against this machine's limits."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmcore import native

from . import (
    bench_accelerate,
    bench_generate,
    bench_step,
    gpu,
    line_up,
    machine,
    overhead,
    plot,
    report,
    roofline,
    table,
)
from .cases import DTYPES, Case, benches, cases
from .contest import Settings, hold
from .timing import QUICK, TABLE, Plan

EXTRAS = ("roofline", "overhead")
"""What can be named besides the ops: this machine's limits, and the cost of a call."""

OPS = "ops"
"""The name of the table of figures to reach; ops named beside it choose its rows."""

WHOLE = {"generate": bench_generate, "step": bench_step, "accelerate": bench_accelerate}
"""The benchmarks of whole models; each stands alone."""


def parts(known: tuple[str, ...], what: str) -> Callable[[str], tuple[str, ...]]:
    """An argument's type: some of `known`, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for part in found:
            if part not in known:
                raise argparse.ArgumentTypeError(
                    f"got {part!r}, expected one of {', '.join(known)} ({what})"
                )
        return found

    return parse


def thread_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {min(counts)}, expected at least 1")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join((*benches(), *EXTRAS))
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help=f"which of {known} (default: all); or {OPS}: the table of the figures to reach, in a "
        f"quarter of an hour (of some ops: {OPS} linear rope); or generate: tokens a second of a "
        "whole model against other libraries; or step: a training step against plain torch; or "
        "accelerate: models of transformers, as they come and after llmcore.accelerate (some of "
        "them: accelerate Llama 'GPT-2 small')",
    )
    parser.add_argument(
        "--shape",
        choices=line_up.SHAPES,
        default=line_up.SMOLLM2,
        help="of generate: SmolLM2-135M, or a random Llama of half a billion weights",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: our CUDA and Triton kernels and torch's on a GPU (default: cpu)",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="with --device cuda: from now on the faster of CUDA and Triton goes first on this GPU",
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, about two minutes")
    parser.add_argument(
        "--threads",
        type=thread_counts,
        help="e.g. 1,2 (default: 1 and all cores; quick: all cores)",
    )
    parser.add_argument(
        "--dtypes",
        type=parts(tuple(DTYPES), "dtypes"),
        default=("fp32", "bf16"),
        help=f"some of {','.join(DTYPES)} (default: fp32,bf16)",
    )
    parser.add_argument(
        "--levels",
        action="store_true",
        help="time each instruction-set level of ours by itself too",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: it takes seconds a case"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where results go (default: benchmarks/results)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="where the plot goes (default: beside the JSON)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; 1 when a kernel of ours fails the yardstick, 2 for a wrong name."""
    known = (OPS, *benches(), *EXTRAS)
    if args.device == "cuda":
        return gpu.run(args)
    rows_have_names = args.ops[:1] == ["accelerate"]
    if args.ops and args.ops[0] in WHOLE and (len(args.ops) == 1 or rows_have_names):
        print_machine(machine.describe())
        status = WHOLE[args.ops[0]].run(args, (args.threads or (machine.cores(),))[0])
        print_apart(machine.apart())
        return status
    unknown = [name for name in args.ops if name not in known]
    if unknown:
        print(f"ops: got {unknown[0]!r}, expected one of {', '.join((*known, *WHOLE))}")
        return 2
    for name in args.ops:
        if OPS in args.ops and name in benches() and not row_list(args, [name]):
            print(f"ops: the table has no such rows of {name}; all cases: llmcore bench {name}")
            return 2
    chosen = args.ops or list(known[1:])
    threads = args.threads or ((machine.cores(),) if args.quick else (machine.cores(), 1))
    threads = tuple(dict.fromkeys(threads))
    settings = settings_of(args)
    found = report.Report(machine.describe(), {**dataclasses.asdict(settings), "ops": chosen})
    print_machine(found.machine)
    before = torch.get_num_threads()
    try:
        if "roofline" in chosen:
            show_roofline(found, threads, settings.plan)
        if OPS in chosen:
            show_table(found, row_list(args, chosen), threads, settings)
        else:
            show_cases(found, case_list(args, chosen), threads, settings)
        if "overhead" in chosen:
            show_overhead(found, chosen, settings.plan)
    finally:  # what an interrupted run has measured is kept
        torch.set_num_threads(before)
        print_apart(machine.apart())
        finish(found, args)
    return 1 if found.failed else 0


def settings_of(args: argparse.Namespace) -> Settings:
    levels = tuple(f"cpu_{level}" for level in native.LEVELS) if args.levels else ()
    is_table = OPS in args.ops
    plan = QUICK if args.quick else TABLE if is_table else Plan()
    compiles = not args.no_compile
    return Settings(plan, ("cpu", *levels), compiles, args.quick, definition=not is_table)


def row_list(args: argparse.Namespace, chosen: list[str]) -> list[table.Row]:
    named = [name for name in chosen if name in benches()]
    return [r for r in table.rows_of(named, args.quick) if r.dtype in args.dtypes]


def case_list(args: argparse.Namespace, chosen: list[str]) -> list[Case]:
    wanted = [bench for op, bench in benches().items() if op in chosen]
    return [case for bench in wanted for case in cases(bench, args.dtypes, args.quick)]


def print_machine(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    levels = ", ".join(found["levels"]) or "no native kernels"
    print(f"{found['cpu']}, {found['cores']} cores, {levels}")
    print(f"{versions}, commit {found['commit'] or 'unknown'}")
    if found["load"] is not None and found["load"] > 0.5:
        print(f"other processes are busy (load {found['load']}): expect noise")
    print_apart(found["apart_ns"])


def print_apart(found: tuple[float, float] | None) -> None:
    """Printed before a run and after it, for it may have changed."""
    if found is not None:
        low, high = (f"{nanoseconds:.0f}" for nanoseconds in found)
        distance = low if low == high else f"{low} to {high}"
        print(f"cores are {distance} ns apart (a cache line from one to another)")


def show_roofline(found: report.Report, threads: tuple[int, ...], plan: Plan) -> None:
    print("\nThis machine's limits, medians (quartiles); of peaks the fastest", flush=True)
    if native.module is None:
        print(f"    cannot be measured: {native.why_not}")
        return
    for count in threads:
        found.roofline += roofline.measure_limits(count, plan)
    print(*report.roofline_lines(found.roofline), sep="\n", flush=True)


def numbered(items: list[Any]) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(items, 1):
        yield f"[{number}/{len(items)}]", item


def show_cases(
    found: report.Report, chosen: list[Case], threads: tuple[int, ...], settings: Settings
) -> None:
    runs = [(case, count) for count in threads for case in chosen]
    for number, (case, count) in numbered(runs):
        print(
            f"\n{number} {case.label}, {report.on_threads(count)}: {case.shape.model}", flush=True
        )
        result = hold(case, count, settings)
        found.results.append(result)
        print(*report.case_lines(result), sep="\n", flush=True)


def show_table(
    found: report.Report, rows: list[table.Row], threads: tuple[int, ...], settings: Settings
) -> None:
    known = benches()
    for count in threads:
        print(f"\nOn {report.on_threads(count)}\n{report.TABLE_TITLE}", flush=True)
        for row in rows:
            result = hold(row.case(known), count, settings)
            found.results.append(result)
            found.table.append(table.line_of(row, result, found.table))
            print(report.table_line(found.table[-1]), flush=True)


def show_overhead(found: report.Report, chosen: list[str], plan: Plan) -> None:
    wanted = [bench for op, bench in benches().items() if op in chosen]
    print("\nCost of a call on a tiny tensor, one thread, medians (quartiles)", flush=True)
    for bench in wanted or benches().values():
        found.overhead += overhead.costs(bench, plan)
    print(*report.overhead_lines(found.overhead), sep="\n", flush=True)


def finish(found: report.Report, args: argparse.Namespace) -> None:
    """The summary, the JSON and the plot."""
    if found.results:
        print("\nSummary")
        print(*report.table_summary(found.table), sep="\n")
        print(*report.summary_lines(found.results), sep="\n")
    path = args.json or machine.results_file()
    found.write(path)
    print(f"\nresults: {path}")
    print(plot.draw(found, args.plot or path.with_suffix(".png")))
