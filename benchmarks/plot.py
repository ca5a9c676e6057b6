"""A picture of a run: what share of this machine's limit each contender reaches, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contest import DEFINITION, OTHERS, OURS, TORCH, Result
from .report import Report, on_threads

COLOURS = {
    DEFINITION: ("#b9b9b9",),
    TORCH: ("#2f6db3", "#8fb8de", "#5fa8a0", "#9bcfc4"),
    OTHERS: ("#7a5aa6", "#b39dd1"),
    OURS: ("#d9541e", "#f0904f", "#f7bd8d", "#b03a0e", "#fadcc4"),
}
"""A side's contenders take its colours in turn."""

MOST_PIXELS = 16_000
"""Of the picture's height."""

WIDEST = 1.25
"""Shares above are noise; their bars are cut there."""


def colours(results: Sequence[Result]) -> dict[str, str]:
    """One colour for each contender of an op, and so the order of its bars and its legend."""
    found: dict[str, str] = {}
    for side, shades in COLOURS.items():
        entries = (e for result in results for e in result.entries if e.side == side)
        for i, name in enumerate(dict.fromkeys(e.name for e in entries)):
            found[name] = shades[i % len(shades)]
    return found


def draw(report: Report, path: Path) -> str:
    """Draws a report as PNG; returns a sentence on what was done, or why nothing was."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'llmcore[bench]')"
    results = [r for r in report.results if r.rate is not None]
    if not results:
        return "no plot: no case has a known limit to be a share of"
    ops = list(dict.fromkeys(r.case.bench.op for r in results))
    threads = sorted({r.threads for r in results})
    groups = {
        (op, n): [r for r in results if (r.case.bench.op, r.threads) == (op, n)]
        for op in ops
        for n in threads
    }
    rows = [max(sum(len(r.entries) + 1 for r in groups[op, n]) for n in threads) for op in ops]
    figure, axes = pyplot.subplots(
        len(ops),
        len(threads),
        figsize=(2 + 6.5 * len(threads), 0.17 * sum(rows) + 1.0 * len(ops) + 0.6),
        gridspec_kw={"height_ratios": rows},
        layout="constrained",
        squeeze=False,
    )
    tallest = figure.get_size_inches()[1]
    for line, op in zip(axes, ops, strict=True):
        for axis, n in zip(line, threads, strict=True):
            panel(axis, groups[op, n], colours([r for r in results if r.case.bench.op == op]))
            axis.set_title(f"{op}, {on_threads(n)}", loc="left", fontsize=10)
    figure.suptitle(title(report), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=min(110, MOST_PIXELS / tallest))
    pyplot.close(figure)
    return f"plot: {path}"


def title(report: Report) -> str:
    machine = report.machine
    versions = machine["versions"]
    return (
        f"Share of this machine's limit (longer is better)\n{machine['cpu']}, "
        f"{machine['cores']} cores, torch {versions['torch']}, llmcore {versions['llmcore']} "
        f"({machine['commit'] or 'no commit'})"
    )


def panel(axis: Any, results: Sequence[Result], shades: dict[str, str]) -> None:
    """Bars grouped by case, the first at the top."""
    from matplotlib import patches

    at, ticks, labels, highest = 0.0, [], [], 1.0
    for result in results:
        first = at
        for name, shade in shades.items():
            entry = next((e for e in result.entries if e.name == name), None)
            share = None if entry is None else result.share(entry)
            if share is None:
                continue
            length = 100 * min(share, WIDEST)
            axis.barh(at, length, height=0.92, color=shade)
            axis.text(length + 0.6, at, f"{100 * share:.0f}", va="center", fontsize=6)
            highest = max(highest, length / 100)
            at += 1
        ticks.append((first + at - 1) / 2)
        case = result.case
        labels.append(f"{case.shape.label}\n{case.dtype} {case.mode}\nof {result.limit}")
        at += 1
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set_ylim(at - 0.5, -1)
    axis.set_xlim(0, 106 * highest)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("% of the limit", fontsize=7)
    handles = [patches.Patch(color=shade, label=name) for name, shade in shades.items()]
    axis.legend(handles=handles, fontsize=6, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
