"""The benchmarks: their arithmetic, their order, that they verify before they time.

No test asserts a time that was measured.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from bench_cases import (  # noqa: F401  (pytest finds fixtures by name here)
    OPS,
    SETTINGS,
    Contender,
    Plan,
    Timing,
    little_to_collect,
    needs_native,
    small,
    small_case,
    small_probes,
)

from llmcore import dispatch, native
from llmcore.benchmarks import (
    cases,
    contest,
    machine,
    memory,
    report,
    roofline,
    shapes,
)
from llmcore.benchmarks import timing as times


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
    noisy = dataclasses.replace(result, waited=0.4)
    assert noisy.is_noisy and not result.is_noisy
    assert next(report.summary_lines([noisy, result])).startswith("  NOISY: in 1 of 2 cases")
    assert next(report.case_lines(noisy)).endswith("threads waited for a core, 40 % of the time")
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


@needs_native
def test_bench_cores_are_some_nanoseconds_apart() -> None:
    found = machine.apart()
    assert found is None if machine.cores() == 1 else 0 < found[0] <= found[1]
    assert native.module.exchange_seconds(0, 0) < 0
    assert native.module.exchange_seconds(0, 1 << 20) < 0
