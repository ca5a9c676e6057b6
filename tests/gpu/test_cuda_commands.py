"""verify and bench with --device cuda: a reason where there is no GPU; the bench's way through a
case, which the CPU can stand in for."""

from __future__ import annotations

import itertools

import pytest
from llmcore.benchmarks.cases import Case, benches

from llmcore import cli, device
from llmcore.benchmarks import gpu


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
