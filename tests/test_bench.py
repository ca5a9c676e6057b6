"""The benchmarks: their arithmetic, their order, that they verify before they time.

No test asserts a time that was measured.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore import cli, dispatch, native, verify_command
from llmcore.benchmarks import (
    cases,
    command,
    contest,
    machine,
    memory,
    plot,
    report,
    roofline,
    shapes,
    table,
)
from llmcore.benchmarks import timing as times
from llmcore.verify import Line, Report

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


class Clock:
    """Time that only passes in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run


def small(op: str) -> cases.Bench:
    """An op's bench with its tiny shape alone."""
    bench = cases.benches()[op]
    modes = bench.shapes[0].modes
    return dataclasses.replace(bench, shapes=(dataclasses.replace(bench.tiny, modes=modes),))


def small_case(op: str, mode: str = shapes.FORWARD, dtype: str = "fp32") -> cases.Case:
    bench = small(op)
    return cases.Case(bench, bench.shapes[0], dtype, mode)


def test_bench_quantiles() -> None:
    assert times.quantile([3.0], 0.5) == 3.0
    assert times.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert times.quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.25) == 2.0
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0), 1)
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))


def test_bench_turns_interleave() -> None:
    orders = [times.turns(4, number) for number in range(50)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders == [times.turns(4, number) for number in range(50)]
    followers = {(a, b) for order in orders for a, b in itertools.pairwise(order)}
    assert len(followers) == 12  # everyone follows everyone


def test_bench_measures_what_the_clock_says() -> None:
    clock = Clock()
    plan = Plan(warm_up=1.0, turn=0.8, total=10.0, fewest_rounds=3, most_rounds=50)
    contenders = [
        Contender("short", clock.call("short", 0.2)),
        Contender("long", clock.call("long", 1.5)),
    ]
    short, long = times.measure(contenders, plan, clock)
    assert (short.calls, long.calls) == (4, 1)
    assert short.median == pytest.approx(0.2) and long.median == pytest.approx(1.5)
    rounds = int(10.0 / (5 * 0.2 + 1.5))  # the short one's turn has one more call, untimed
    assert len(short.seconds) == len(long.seconds) == rounds
    warm = ["short"] * 5 + ["long"] * 2  # by time, and at least twice
    assert clock.log[: len(warm)] == warm
    rest = clock.log[len(warm) :]
    assert rest.count("short") == 5 * rounds and rest.count("long") == rounds


def test_bench_rounds_keep_to_the_plan() -> None:
    plan = Plan(total=2.0, fewest_rounds=5, most_rounds=20)
    assert times.rounds_in(plan, 0.25) == 8
    assert times.rounds_in(plan, 3.0) == 5
    assert times.rounds_in(plan, 1e-6) == 20
    assert times.calls_in(0.004, 0.001) == 4 and times.calls_in(0.004, 1.0) == 1


def test_bench_bytes_and_operations() -> None:
    benches = cases.benches()
    rows = shapes.Rows("test", 10, 8)
    assert benches["rms_norm"].work(rows, 4, shapes.FORWARD).bytes == 4 * (2 * 80 + 8)
    assert benches["rms_norm"].work(rows, 2, shapes.BACKWARD).bytes == 2 * (3 * 80 + 2 * 8)
    assert benches["layer_norm"].work(rows, 4, shapes.INTO).bytes == 4 * (2 * 80 + 2 * 8)
    assert benches["softmax"].work(rows, 2, shapes.BACKWARD) == cases.Work(480, 320, "copy")
    full = shapes.Heads("test", 2, 4, 2, 16, 16, 8)
    work = benches["attention"].work(full, 4, shapes.FORWARD)
    assert work.flops == 4 * 2 * 4 * 16 * 16 * 8 and work.bound == "fma"
    assert work.bytes == 4 * (2 * 2 * 4 * 16 * 8 + 2 * 2 * 2 * 16 * 8)
    causal = dataclasses.replace(full, causal=True)
    assert causal.pairs == 2 * 4 * (16 * 17 // 2)
    assert dataclasses.replace(causal, T=3).pairs == 2 * 4 * (14 + 15 + 16)
    backward = benches["attention"].work(causal, 2, shapes.BACKWARD)
    assert backward.flops == 10 * causal.pairs * 8
    decode = dataclasses.replace(full, T=1, S=100)
    assert benches["attention"].work(decode, 4, shapes.FORWARD).bound == "read"


def test_bench_every_bench_is_found_and_drawn_as_it_says() -> None:
    assert {"attention", "layer_norm", "rms_norm", "softmax"} <= set(OPS)
    for op in OPS:
        assert op in dispatch.REGISTRY
        bench = cases.benches()[op]
        assert any(shape.quick for shape in bench.shapes), op
        labels = [shape.label for shape in bench.shapes]
        assert len(set(labels)) == len(labels), op
        assert len(list(cases.cases(bench, ("fp32", "bf16"), quick=True))) < 16, op


@pytest.mark.parametrize("op", OPS)
def test_bench_every_mode_is_timed(op: str) -> None:
    for case in cases.cases(small(op), ("fp32", "bf16"), quick=False):
        result = contest.hold(case, 1, SETTINGS)
        sides = {entry.side for entry in result.entries if entry.timing is not None}
        has_kernel = not contest.why_not(dispatch.REGISTRY[op], "cpu")
        wanted = {contest.TORCH} | ({contest.OURS} if has_kernel else set())
        assert wanted <= sides, f"{case.label}: {result.entries}"
        assert not result.failed
        assert (result.rate is None) == (native.module is None)


@needs_native
@pytest.mark.parametrize("mode", [shapes.FORWARD, shapes.BACKWARD])
def test_bench_refuses_a_broken_kernel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = dispatch.REGISTRY["rms_norm"]
    right = op.candidate("cpu")
    assert right is not None and right.backward is not None
    forward, backward = right.forward, right.backward
    wrong = dataclasses.replace(
        right,
        forward=lambda *args: forward(*args) * 1.001,
        backward=lambda *args: tuple(d * 1.01 for d in backward(*args)),
    )
    monkeypatch.setattr(op, "candidates", (wrong, *op.candidates[1:]))
    monkeypatch.setattr(op, "chosen", {})
    result = contest.hold(small_case("rms_norm", mode), 1, SETTINGS)
    ours = next(e for e in result.entries if e.side == contest.OURS)
    assert ours.timing is None and ours.error is not None and ours.error > 1
    assert "times the yardstick's bound" in ours.why_not
    assert result.failed and result.best(contest.TORCH) is not None
    assert any("FAILED" in line for line in report.case_lines(result))


def test_bench_leaves_out_a_peer_that_computes_something_else() -> None:
    bench = small("softmax")
    coarse = cases.Peer("coarse", lambda x: x.bfloat16().softmax(-1).float())
    other = cases.Peer("other", lambda x: x.sigmoid())
    broken = cases.Peer("broken", lambda x: x.no_such_method())
    bench = dataclasses.replace(bench, peers=lambda shape: [coarse, other, broken])
    case = cases.Case(bench, bench.shapes[0], "fp32", shapes.FORWARD)
    found = {e.name: e for e in contest.hold(case, 1, SETTINGS).entries}
    assert found["coarse"].timing is not None and "rounds coarsely" in found["coarse"].note
    assert found["other"].timing is None and "bound" in found["other"].why_not
    assert found["broken"].why_not.startswith("AttributeError")


def test_bench_shares_and_ratios() -> None:
    entries = [
        contest.Entry("F", contest.TORCH, Timing((2e-3,), 1)),
        contest.Entry("compiled F", contest.TORCH, Timing((1e-3,), 1)),
        contest.Entry("llmcore cpu", contest.OURS, Timing((0.5e-3,), 1)),
    ]
    case = small_case("rms_norm")
    result = contest.Result(case, 1, "copy", case.work.bytes / 0.25e-3, entries)
    assert result.share(entries[2]) == pytest.approx(0.5)
    assert result.against_torch(entries[2]) == pytest.approx(2.0)
    assert "faster in 1 of 1" in next(report.summary_lines([result]))
    noisy = dataclasses.replace(result, cores=0.6)
    assert noisy.is_noisy and not result.is_noisy
    assert next(report.summary_lines([noisy, result])).startswith("  NOISY: in 1 of 2 cases")
    assert next(report.case_lines(noisy)).endswith("this process had 60 % of its cores")
    slow = contest.Entry("llmcore cpu", contest.OURS, Timing((2e-3,), 1))
    loss = contest.Result(case, 1, "copy", None, [*entries[:2], slow])
    lines = list(report.summary_lines([result, loss]))
    assert any("LOSES" in line and "0.50x compiled F" in line for line in lines)


def test_bench_prepared_and_other_peers() -> None:
    """A prepared peer has its own arguments; another library is no part of torch's best."""
    bench = small("linear")
    packed = cases.Peer("packed", lambda x, w: x @ w, prepare=lambda x, w: (x, w.T.contiguous()))
    other = cases.Peer("other", lambda x, w: x @ w.T, is_torch=False, rest=1e-6)
    half = cases.Peer("half", lambda x, w: x @ w.T, dtypes=("bf16",))
    bench = dataclasses.replace(bench, peers=lambda shape: [packed, other, half])
    case = cases.Case(bench, bench.shapes[0], "fp32", shapes.FORWARD)
    result = contest.hold(case, 1, SETTINGS)
    found = {e.name: e for e in result.entries}
    assert found["packed"].timing is not None and found["other"].timing is not None
    assert "half" not in found and found["other"].side == contest.OTHERS
    best = result.best(contest.TORCH)
    assert best is not None and best.name == "packed"


@pytest.mark.parametrize(
    ("op", "name", "needs"),
    [
        ("attention", "onnxruntime Attention", ("onnx", "onnxruntime")),
        ("layer_norm", "onnxruntime LayerNormalization", ("onnx", "onnxruntime")),
        ("linear", "OpenBLAS (numpy)", ("threadpoolctl",)),
    ],
)
def test_bench_other_libraries(op: str, name: str, needs: tuple[str, ...]) -> None:
    for module in needs:
        pytest.importorskip(module)
    result = contest.hold(small_case(op), 1, SETTINGS)
    (found,) = (e for e in result.entries if e.name == name)
    if "not linked with OpenBLAS" in found.why_not:
        pytest.skip(found.why_not)
    assert found.timing is not None and found.side == contest.OTHERS, found.why_not


@pytest.mark.parametrize("packed", ["fp32", "bf16", "int8", "int4"])
def test_bench_packed_weights(packed: str) -> None:
    shape = shapes.Product("test", 1, 64, 32, packed, modes=(shapes.FORWARD,))
    bench = dataclasses.replace(cases.benches()["linear"], shapes=(shape,))
    bits = {"fp32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}  # a scale has 16 bits for 32 values
    size = int(32 * 64 * bits[packed] / 8)
    assert bench.work(shape, 2, shapes.FORWARD).bytes == size + 2 * (64 + 32)
    dtype = "fp32" if packed == "fp32" else "bf16"
    result = contest.hold(cases.Case(bench, shape, dtype, shapes.FORWARD), 1, SETTINGS)
    timed = {e.name for e in result.entries if e.timing is not None}
    own = f"_weight_{packed}pack_mm" if "int" in packed else "oneDNN, packed"
    assert {own, "F.linear, whole weight"} <= timed, result.entries


def test_bench_ligers_chunks_give_the_loss_and_its_gradients() -> None:
    bench = dataclasses.replace(
        cases.benches()["linear_cross_entropy"],
        shapes=(shapes.Product("test", 37, 16, 50, modes=(shapes.BOTH,)),),
    )
    case = cases.Case(bench, bench.shapes[0], "fp32", shapes.BOTH)
    found = {e.name: e for e in contest.hold(case, 1, SETTINGS).entries}
    assert found["Liger's chunks"].timing is not None, found["Liger's chunks"].why_not
    assert found["F.linear, F.cross_entropy"].timing is not None


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


needs_memory = pytest.mark.skipif(
    not memory.can_be_measured(), reason="this system does not tell the memory of a call"
)


@needs_memory
def test_bench_memory_is_what_a_call_holds_beyond_its_results() -> None:
    x = torch.ones(4 << 20)  # 16 MiB

    def extra(call: Any) -> float:
        contender = Contender("call", call)
        call()
        found = memory.extra(contender)
        assert found is not None
        return found / x.nbytes

    assert extra(lambda: [x + 1]) < 0.1
    assert extra(lambda: x.add_(1)) < 0.1
    assert 0.9 < extra(lambda: [(x + 1).sum()]) < 1.1
    assert 2.9 < extra(lambda: [((x + 1) * (x + 2)).sum()]) < 3.1
    assert 0.9 < extra(lambda: [(x + 1) * 2]) < 1.1


@needs_native
def test_bench_roofline_probes_do_what_they_say() -> None:
    torch.set_num_threads(2)
    x = torch.arange(3001.0)
    result, out = torch.zeros(2), torch.zeros_like(x)
    roofline.raw("read")(x, 3, result)
    assert result.sum() == pytest.approx(3 * x.sum().item(), rel=1e-6)
    for past_caches in (False, True):
        roofline.raw("copy")(x, 2, past_caches, out.zero_())
        assert torch.equal(out, x)
    operations = roofline.raw("fma")(10, result)
    assert operations > 0 and operations % (2 * 2 * 10) == 0
    assert roofline.raw("fma")(20, result) == 2 * operations
    assert roofline.raw("bf16_pairs")(10, result) in (0, 2 * operations)
    assert result.isfinite().all()
    assert roofline.read(1 << 20, sets=3).amount == 1 << 20
    with pytest.raises(RuntimeError, match="out: expected"):
        roofline.raw("copy")(x, 1, False, out[:-1])


def test_bench_data_sets_take_turns() -> None:
    calls = roofline.in_turn([lambda: 1, lambda: 2, lambda: 3])
    assert [calls() for _ in range(5)] == [1, 2, 3, 1, 2]


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with tiny shapes and next to no time."""
    monkeypatch.setattr(command, "benches", lambda: {op: small(op) for op in OPS})
    monkeypatch.setattr(command, "settings_of", lambda args: SETTINGS)
    monkeypatch.setattr(command, "case_list", lambda args, chosen: [small_case("softmax")])


@pytest.mark.parametrize("has_native", [pytest.param(True, marks=needs_native), False])
def test_bench_command_writes_json_and_plot(
    has_native: bool,
    tiny_run: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not has_native:
        monkeypatch.setattr(native, "module", None)
        monkeypatch.setattr(native, "why_not", "not built: for this test")
    path = tmp_path / "new" / "found.json"
    assert cli.main(["bench", "--threads", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Summary" in out and str(path) in out
    found = json.loads(path.read_text())
    assert found["format"] == report.FORMAT
    assert found["machine"]["versions"]["torch"] == torch.__version__
    (case,) = found["cases"]
    assert (case["op"], case["dtype"], case["threads"]) == ("softmax", "fp32", 1)
    timed = [c for c in case["contenders"] if "seconds" in c]
    assert {c["side"] for c in timed} >= {"torch", "definition"}
    assert all(c["seconds"] > 0 and c["quartiles"][0] <= c["quartiles"][1] for c in timed)
    assert {c["op"] for c in found["overhead"]} == set(OPS)
    assert bool(found["roofline"]) == has_native
    assert all(c["share_of_limit"] for c in timed) == has_native
    if not has_native:
        assert "cannot be measured: not built" in out and "no plot: no case" in out


def test_bench_command_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {op: small(op) for op in OPS}
    rows = [
        table.Row(op, bench.tiny.label, "fp32", shapes.FORWARD, table.Goal(ratio=1e9))
        for op, bench in tiny.items()
    ]
    monkeypatch.setattr(command, "benches", lambda: tiny)
    monkeypatch.setattr(command, "settings_of", lambda args: SETTINGS)
    monkeypatch.setattr(table, "ROWS", rows)
    path = tmp_path / "found.json"
    assert cli.main(["bench", "ops", "softmax", "--threads", "1,2", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("\nsoftmax 4x64 fp32 forward") == 2
    assert "On 1 thread\n" in out and "On 2 threads\n" in out
    lines = json.loads(path.read_text())["table"]
    assert [(line["op"], line["threads"]) for line in lines] == [("softmax", 1), ("softmax", 2)]
    if native.module is not None:
        assert "0 of 1 rows reach their figures" in out
        assert all(line["misses"] == ["ratio"] for line in lines)


def test_bench_table_survives_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = table.Row("softmax", "4x64", "fp32", shapes.FORWARD, table.Goal(ratio=1.0))
    monkeypatch.setattr(command, "benches", lambda: {"softmax": small("softmax")})
    monkeypatch.setattr(command, "settings_of", lambda args: SETTINGS)
    monkeypatch.setattr(table, "ROWS", [row, row])
    held = iter([contest.hold])

    def hold(*args: Any) -> contest.Result:
        function = next(held, None)
        if function is None:
            raise KeyboardInterrupt
        return function(*args)

    monkeypatch.setattr(command, "hold", hold)
    path = tmp_path / "found.json"
    assert cli.main(["bench", "ops", "--threads", "1", "--json", str(path)]) == 130
    assert len(json.loads(path.read_text())["table"]) == 1
    assert "Summary" in capsys.readouterr().out


@needs_native
def test_bench_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [contest.hold(small_case(op), 1, SETTINGS) for op in OPS]
    whole = report.Report(machine.describe(), {}, results=results)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw(whole, tmp_path / "a.png").startswith("no plot: matplotlib is not installed")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert plot.draw(whole, tmp_path / "a.png") == f"plot: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "fp32,fp8"], "got 'fp8', expected one of fp32, bf16, fp16"),
        (["--threads", "0"], "got 0, expected at least 1"),
        (["dance"], "ops: got 'dance', expected one of"),
    ],
)
def test_bench_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["bench", *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    assert status == 2 and message in said.out + said.err


def test_bench_machine_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    name = machine.name()
    assert name == name.lower() and " " not in name and "/" not in name
    assert machine.results_file().parent.name == name
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.results_file().parts[0] == "benchmarks-results"
    assert machine.commit() is None
    assert math.isfinite(json.loads(json.dumps(machine.describe()))["cores"])


def test_verify_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for failures, status in (((), 0), (("y0: error 1, bound 0",), 1)):
        lines = [
            Line("softmax", "cpu", "float32", 3, 0.5, failures),
            Line("softmax", "cuda", "float32", 0, 0.0, (), "this torch is a CPU build"),
        ]
        monkeypatch.setattr(
            verify_command, "verify", lambda seed, progress, lines=lines: Report(lines)
        )
        assert cli.main(["verify", "--seed", "3"]) == status
        out = capsys.readouterr().out
        assert "this torch is a CPU build" in out and "1 skipped" in out
