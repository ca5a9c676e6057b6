"""`llmcore bench ops`: for each op the figures it is to reach, and whether it does on this machine.

A row is a case of an op's bench, found by its label, and a goal. Shares are of this machine's own
limit, ratios are to torch's best in the same run.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import DTYPES, Bench, Case
from .contest import OURS, Entry, Result
from .roofline import BF16_PEAK
from .shapes import BACKWARD, BOTH, FORWARD, INTO, Product


@dataclass(frozen=True)
class Goal:
    """What llmcore is to reach at least; None: nothing is asked.

    share: of the limit.
    ratio: times torch's best, torch.compile included.
    eager_ratio: times torch's best without torch.compile.
    fp32_ratio: times torch's best in float32 on the same shape, without torch.compile.
    extra: of the memory that the whole logits take, at most.
    """

    share: float | None = None
    ratio: float | None = None
    eager_ratio: float | None = None
    fp32_ratio: float | None = None
    extra: float | None = None

    def __str__(self) -> str:
        parts = [
            "" if self.share is None else f"{100 * self.share:.0f} %",
            "" if self.ratio is None else f"{self.ratio:g}x",
            "" if self.eager_ratio is None else f"{self.eager_ratio:g}x eager",
            "" if self.fp32_ratio is None else f"{self.fp32_ratio:g}x fp32's",
            "" if self.extra is None else f"{100 * self.extra:.0f} % of the logits",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Row:
    """A line of the table; `with_dot` is its goal where the CPU has a dot product of bfloat16."""

    op: str
    shape: str
    dtype: str
    mode: str
    goal: Goal
    with_dot: Goal | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.mode}"

    def case(self, benches: dict[str, Bench]) -> Case:
        bench = benches[self.op]
        (shape,) = (shape for shape in bench.shapes if shape.label == self.shape)
        assert self.mode in shape.modes and self.dtype in DTYPES, self.name
        return Case(bench, shape, self.dtype, self.mode)


def attention_rows() -> Iterator[Row]:
    full, causal = ("1x12x1024x64", "1x16/8x1024x128"), " causal"
    for mark, share, ratio in (("", 0.8, 1.5), (causal, 0.75, 1.8)):
        for shape in full:
            quick = shape == full[0]
            goal = Goal(share, eager_ratio=ratio)
            yield Row("attention", shape + mark, "fp32", FORWARD, goal, quick=quick)
            goal, with_dot = Goal(eager_ratio=ratio), Goal(fp32_ratio=3.0)
            yield Row("attention", shape + mark, "bf16", FORWARD, goal, with_dot, quick)
    yield Row("attention", "1x12x2048x64 causal", "fp32", FORWARD, Goal(0.75, eager_ratio=1.8))
    for dtype, ratio in (("fp32", 1.5), ("bf16", 6.0)):
        for shape in (full[0], full[0] + causal):
            quick = shape == full[0] + causal
            yield Row("attention", shape, dtype, BACKWARD, Goal(eager_ratio=ratio), quick=quick)
    for dtype, ratio in (("fp32", 1.5), ("bf16", 10.0)):
        goal = Goal(0.9, eager_ratio=ratio)
        yield Row("attention", "1x9/3x1:2048x64 cold", dtype, FORWARD, goal, quick=True)
    yield Row("attention", "8x12x128x64", "fp32", FORWARD, Goal(0.6), quick=True)


def memory_bound_rows() -> Iterator[Row]:
    """Into a given tensor the share counts, into a fresh one, bound by page faults, the ratio."""
    rows = "4096x768"
    for op, shape, share, forward, backward in (
        ("layer_norm", rows, 0.9, 1.5, 1.5),
        ("rms_norm", rows, 0.9, 3.0, 10.0),
        ("add_layer_norm", rows, 0.9, 2.0, 2.0),
        ("add_rms_norm", rows, 0.9, 2.0, 2.0),
        ("softmax", rows, 0.85, 1.8, None),
        ("masked_softmax", "12288x1024", 0.85, 12.0, None),
    ):
        yield Row(op, shape, "fp32", INTO, Goal(share), quick=True)
        yield Row(op, shape, "fp32", FORWARD, Goal(eager_ratio=forward))
        if backward is not None:
            goal = Goal(eager_ratio=backward)
            yield Row(op, shape, "fp32", BACKWARD, goal, quick=op == "rms_norm")
    for op, shape in (("rope", "1x32x2048x64"), ("gelu", "1024x3072"), ("swiglu", "512x8192")):
        yield Row(op, shape, "fp32", INTO, Goal(0.85), quick=True)
        yield Row(op, shape, "fp32", FORWARD, Goal(ratio=1.3))


def linear_rows() -> Iterator[Row]:
    for shape in ("512x576x3072", "2048x768x3072"):
        for mode in (FORWARD, BACKWARD):
            quick = shape == "512x576x3072"
            yield Row("linear", shape, "fp32", mode, Goal(0.8, 1.3), quick=quick)
            # With the instruction torch has it too, and no figure was set but to be no slower.
            with_dot = Goal(ratio=1.0)
            yield Row("linear", shape, "bf16", mode, Goal(0.8, 10.0), with_dot, quick)
    for format in ("fp32", "bf16"):  # packed beforehand, as torch's peer is
        goal = Goal(0.8, 1.0) if format == "fp32" else Goal(ratio=1.0)
        yield Row("linear", f"2048x768x3072 {format}", format, FORWARD, goal)
    for rows, share in ((1, 0.9), (8, 0.7)):
        for dtype, mark in (("fp32", ""), ("bf16", ""), ("bf16", " int8"), ("bf16", " int4")):
            label = f"{rows}x4096x4096{mark} cold"
            yield Row("linear", label, dtype, FORWARD, Goal(share), quick=rows == 1)


def loss_rows() -> Iterator[Row]:
    yield Row("cross_entropy", "2048x50257", "fp32", FORWARD, Goal(0.85))
    yield Row("cross_entropy", "128x49152", "fp32", FORWARD, Goal(0.85), quick=True)
    for mode in (FORWARD, BOTH):
        goal = Goal(ratio=1.0, extra=0.05)
        yield Row("linear_cross_entropy", "2048x768x50257", "fp32", mode, goal)


ROWS = (*attention_rows(), *memory_bound_rows(), *linear_rows(), *loss_rows())


@dataclass(frozen=True)
class Line:
    """A row as it was measured on so many threads; `fp32` is the same case in float32, if known."""

    row: Row
    result: Result
    fp32: Result | None = None

    @property
    def goal(self) -> Goal:
        has_dot = self.result.limit == BF16_PEAK
        return self.row.with_dot if has_dot and self.row.with_dot else self.row.goal

    @property
    def ours(self) -> Entry | None:
        return self.result.best(OURS)

    @property
    def misses(self) -> list[str] | None:
        """What falls short of its figure; None where that is not known: nothing of ours was timed,
        or no limit, peer or memory is there to hold it to."""
        ours, goal = self.ours, self.goal
        if ours is None:
            return None
        eager = self.result.against_torch(ours, eager=True)
        of_fp32 = None if self.fp32 is None else self.fp32.against_torch(ours, eager=True)
        checks = (
            ("share", goal.share, self.result.share(ours), operator.ge),
            ("ratio", goal.ratio, self.result.against_torch(ours), operator.ge),
            ("eager_ratio", goal.eager_ratio, eager, operator.ge),
            ("fp32_ratio", goal.fp32_ratio, of_fp32, operator.ge),
            ("extra", goal.extra, self.extra_share, operator.le),
        )
        missed = []
        for name, figure, reached, holds in checks:
            if figure is None:
                continue
            if reached is None:
                return None
            if not holds(reached, figure):
                missed.append(name)
        return missed

    @property
    def extra_share(self) -> float | None:
        """Our extra memory as a part of the logits' (a linear's M rows by N classes)."""
        ours, shape = self.ours, self.result.case.shape
        if ours is None or ours.extra is None or not isinstance(shape, Product):
            return None
        return ours.extra / (shape.M * shape.N * DTYPES[self.result.case.dtype].itemsize)

    def as_json(self) -> dict[str, Any]:
        case = self.result.case
        return {
            "op": self.row.op,
            "shape": self.row.shape,
            "dtype": case.dtype,
            "mode": case.mode,
            "threads": self.result.threads,
            "goal": str(self.goal),
            "misses": self.misses,
            "extra_share_of_logits": self.extra_share,
        }


def rows_of(ops: Sequence[str], quick: bool) -> list[Row]:
    """The rows of these ops (none named: of all)."""
    return [r for r in ROWS if (not ops or r.op in ops) and (r.quick or not quick)]


def line_of(row: Row, result: Result, earlier: Sequence[Line]) -> Line:
    """A row's line; the float32 case that it may be held to was measured before, or is missing."""
    same = (row.op, row.shape, row.mode, result.threads)
    twins = (
        other.result
        for other in earlier
        if (other.row.op, other.row.shape, other.row.mode, other.result.threads) == same
        and other.row.dtype == "fp32"
    )
    return Line(row, result, next(twins, None))
