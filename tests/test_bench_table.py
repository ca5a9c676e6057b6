"""The table of `llmcore bench ops`: its rows, and how it holds them to their figures."""

from __future__ import annotations

import dataclasses

from bench_cases import (  # noqa: F401  (pytest finds fixtures by name here)
    Timing,
    little_to_collect,
    small_probes,
)

from llmcore.benchmarks import (
    cases,
    contest,
    roofline,
    shapes,
    table,
)


def entry(side: str, seconds: float, extra: int | None = 0) -> contest.Entry:
    return contest.Entry(side, side, Timing((seconds,), 1), extra=extra)


def measured(row: table.Row, ours: contest.Entry | None, limit: str = "FMA peak") -> table.Line:
    """A row's line where torch takes 3 ms, and the limit would be 1 ms."""
    case = row.case(cases.benches())
    entries = [entry(contest.TORCH, 3e-3)] + ([ours] if ours is not None else [])
    result = contest.Result(case, 1, limit, case.work.amount / 1e-3, entries)
    return table.line_of(row, result, [])


def test_bench_table_rows_are_cases_of_the_benches() -> None:
    benches = cases.benches()
    for row in table.ROWS:
        assert row.case(benches).label == row.name and str(row.goal), row.name
    assert len({row.name for row in table.ROWS}) == len(table.ROWS)
    quick = table.rows_of((), quick=True)
    assert 20 < len(quick) < len(table.ROWS)
    assert {row.op for row in table.rows_of(("rope", "linear"), False)} == {"rope", "linear"}


def test_bench_table_holds_rows_to_their_figures() -> None:
    goal = table.Goal(share=0.8, ratio=2.0)
    row = table.Row("linear", "512x576x3072", "fp32", shapes.FORWARD, goal)
    assert measured(row, entry(contest.OURS, 1.2e-3)).misses == []
    assert measured(row, entry(contest.OURS, 1.3e-3)).misses == ["share"]
    assert measured(row, entry(contest.OURS, 1.6e-3)).misses == ["share", "ratio"]
    assert measured(row, None).misses is None
    known = measured(row, entry(contest.OURS, 1e-3)).result
    assert table.line_of(row, dataclasses.replace(known, rate=None), []).misses is None
    assert str(goal) == "80 %, 2x"


def test_bench_table_holds_bf16_to_fp32s_time_where_there_is_an_instruction() -> None:
    goals = table.Goal(ratio=2.0), table.Goal(fp32_ratio=3.0)
    halves, wholes = (
        table.Row("attention", "1x12x1024x64", dtype, shapes.FORWARD, *goals)
        for dtype in ("bf16", "fp32")
    )
    assert measured(halves, entry(contest.OURS, 1.4e-3)).misses == []
    alone = measured(halves, entry(contest.OURS, 0.9e-3), roofline.BF16_PEAK)
    assert alone.goal == goals[1] and alone.misses is None
    whole = measured(wholes, entry(contest.OURS, 1e-3))
    assert table.line_of(halves, alone.result, [whole]).misses == []
    slow = measured(halves, entry(contest.OURS, 1.4e-3), roofline.BF16_PEAK)
    assert table.line_of(halves, slow.result, [whole]).misses == ["fp32_ratio"]


def test_bench_table_tells_eager_from_compiled() -> None:
    goals = {"ratio": table.Goal(ratio=2.0), "eager_ratio": table.Goal(eager_ratio=2.0)}
    for name, goal in goals.items():
        row = table.Row("rms_norm", "4096x768", "fp32", shapes.FORWARD, goal)
        result = measured(row, entry(contest.OURS, 1e-3)).result
        compiled = dataclasses.replace(entry(contest.TORCH, 1.5e-3), is_compiled=True)
        result.entries.append(compiled)
        missed = table.line_of(row, result, []).misses
        assert missed == (["ratio"] if name == "ratio" else [])
        slow = dataclasses.replace(result, entries=[*result.entries, entry(contest.OURS, 1.6e-3)])
        slow.entries.remove(result.entries[1])
        assert table.line_of(row, slow, []).misses == [name]
        assert result.best(contest.TORCH) is compiled
        assert result.best(contest.TORCH, eager=True) is not compiled


def test_bench_table_holds_a_loss_to_its_memory() -> None:
    goal, label = table.Goal(extra=0.05), "2048x768x50257"
    row = table.Row("linear_cross_entropy", label, "fp32", shapes.FORWARD, goal)
    twentieth = 2048 * 50257 * 4 // 20
    assert measured(row, entry(contest.OURS, 1e-3, twentieth)).misses == []
    assert measured(row, entry(contest.OURS, 1e-3, twentieth + 1000)).misses == ["extra"]
    assert measured(row, entry(contest.OURS, 1e-3, None)).misses is None
