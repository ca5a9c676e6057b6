"""verify and bench with --device cuda: a reason where there is no GPU; the bench's way through a
case, which the CPU can stand in for."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
from llmcore.benchmarks.cases import Case, benches

from llmcore import cli, device, gpu_table, verify_command
from llmcore.benchmarks import gpu
from llmcore.verify import Line, Report


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_cuda_commands_say_why_not(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cuda_reason", lambda: "torch finds no GPU")
    assert cli.main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().out.startswith("skipped: torch finds no GPU")


@pytest.mark.slow
def test_cuda_bench_holds_a_case() -> None:
    """Ours is verified and timed, a peer is timed, a backend that is not there says why."""
    bench = benches()["rms_norm"]
    ticks = itertools.count(1)
    case = Case(bench, bench.tiny, "fp32", "forward")
    lines = gpu.hold(case, "cpu", lambda call, calls: next(ticks) * 1e-6, ("cpu", "cuda"))
    found = {line.name: line for line in lines}
    assert found["llmcore cpu"].seconds and not found["llmcore cpu"].why_not
    assert found["llmcore cuda"].seconds is None and found["llmcore cuda"].why_not
    assert any(line.seconds for name, line in found.items() if not name.startswith("llmcore"))


@pytest.mark.parametrize(("exit_status", "expected"), [(0, 0), (9, 1)])
def test_cuda_verify_runs_the_sanitizer(
    exit_status: int,
    expected: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each tool once more over the same run, where there is one; what it finds fails the run."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho found\nexit {exit_status}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(device, "cuda_reason", lambda: None)
    passed = Report([Line("rms_norm", "cuda", "float32", 1, 0.0, ())])
    monkeypatch.setattr(verify_command, "verify", lambda **options: passed)
    assert cli.main(["verify", "--device", "cuda", "--seed", "3"]) == expected
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck", "synccheck"]
    assert all(call.endswith("verify --device cuda --no-sanitizer --seed 3") for call in calls)
    out = capsys.readouterr().out
    assert ("racecheck: nothing found" in out) == (expected == 0)
    assert ("racecheck: FAILED\nfound" in out) == (expected == 1)


def test_cuda_verify_without_a_sanitizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert verify_command.sanitized(0)
    assert capsys.readouterr().out.startswith("skipped: compute-sanitizer is not installed")


def test_cuda_bench_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCORE_GPU_TABLE", str(tmp_path / "table.json"))
    monkeypatch.setattr(device, "cuda_reason", lambda: None)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu, "shapes_of", lambda case: f"{case.dtype} {case.shape.label}")
    times = [gpu.Line("llmcore cuda", 2e-6), gpu.Line("llmcore triton", 1e-6), gpu.Line("torch", 1)]
    monkeypatch.setattr(gpu, "hold", lambda case: times)
    options = {"ops": ["rms_norm"], "dtypes": ("bf16",), "quick": True, "table": True}
    assert gpu.run(argparse.Namespace(**options, json=tmp_path / "results.json")) == 0
    found = gpu_table.table()["Some GPU"]["rms_norm"]
    assert found and all(kind.startswith("bf16") for kind in found)
    assert gpu_table.measured("Some GPU", "rms_norm", next(iter(found))).fastest == "triton"
