"""`llmcore bench` and `llmcore verify` as commands: what they print and write."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import (  # noqa: F401  (pytest finds fixtures by name here)
    OPS,
    SETTINGS,
    little_to_collect,
    needs_native,
    small,
    small_case,
    small_probes,
)

from llmcore import cli, native, verify_command
from llmcore.benchmarks import (
    bench_accelerate,
    command,
    contest,
    machine,
    plot,
    report,
    shapes,
    table,
)
from llmcore.verify import Line, Report


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
        (
            ["ops", "rope", "attention_varlen"],
            "no such rows of attention_varlen; all cases: llmcore",
        ),
        (["accelerate", "dance"], "accelerate: got 'dance', expected some of GPT-2, Llama"),
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


def test_bench_accelerate_takes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    shape = bench_accelerate.Shape("BERT-base", 2.0, 1.0, 1.3)
    monkeypatch.setattr(bench_accelerate, "fma_peak", lambda: 1e9)
    monkeypatch.setattr(
        bench_accelerate, "compare", lambda f, rounds: bench_accelerate.Row(f.name, {}, [], 0.0)
    )
    monkeypatch.setitem(bench_accelerate.SHAPES, "BERT-base", lambda rounds: iter([shape]))
    path = tmp_path / "found.json"
    assert cli.main(["bench", "accelerate", "BERT-base", "Llama", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| Llama |" in said and "| BERT-base | 2.0 | 1.0 | 2.00 |" in said
    assert "| GPT-2 |" not in said and path.exists()


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
        monkeypatch.setattr(verify_command, "verify", lambda seed, lines=lines, **_: Report(lines))
        assert cli.main(["verify", "--seed", "3"]) == status
        out = capsys.readouterr().out
        assert "this torch is a CPU build" in out and "1 skipped" in out
