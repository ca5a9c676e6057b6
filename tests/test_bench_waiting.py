"""benchmarks/waiting.py: whether others had the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcore.benchmarks import waiting

SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile 1: 0"


def test_bench_waiting_is_what_threads_waited_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([{"1": 5.0}, {"1": 5.5, "2": 0.25}])
    monkeypatch.setattr(waiting, "waits", lambda: next(counted))
    monkeypatch.setattr(waiting.time, "perf_counter", iter([10.0, 12.5]).__next__)
    share = waiting.Waiting().share()
    assert share == 0.3 and waiting.is_disturbed(share)


def test_bench_waiting_reads_the_kernels_count(tmp_path: Path) -> None:
    (tmp_path / "71").mkdir()
    (tmp_path / "71" / "schedstat").write_text("9000000000 2500000000 17\n")  # ran, waited, turns
    assert waiting.waits(tmp_path) == {"71": 2.5}


def test_bench_waiting_is_unknown_where_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "waits", dict)
    share = waiting.Waiting().share()
    assert share is None and not waiting.is_disturbed(share)


@pytest.mark.skipif(not waiting.waits(), reason="this system doesn't count it")
def test_bench_waiting_sees_another_program_on_the_core() -> None:
    cpus = os.sched_getaffinity(0)
    with subprocess.Popen(
        [sys.executable, "-c", SPIN, str(min(cpus))], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            os.sched_setaffinity(0, {min(cpus)})
            found, end = waiting.Waiting(), time.thread_time() + 0.1
            while time.thread_time() < end:
                pass
            assert (found.share() or 0) > 0
        finally:
            os.sched_setaffinity(0, cpus)
            other.kill()
