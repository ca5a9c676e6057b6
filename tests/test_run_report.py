"""The run's own rules: no silent absence of native kernels, and a table of what was executed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_counts import Recorder, Summary, digest
from run_report import table

ROOT = Path(__file__).parent.parent
WITHOUT_NATIVE = (
    "import sys; sys.modules['llmcore._native'] = None; import pytest\n"
    "sys.exit(pytest.main(['tests/ops/test_softmax.py', '-k', 'errors']))"
)


def without_native(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler: the rule does not apply")
def test_run_fails_without_native_kernels() -> None:
    done = without_native(LLMCORE_ALLOW_NO_NATIVE="")
    assert done.returncode == 1
    assert "the native kernels did not load: not built" in done.stdout + done.stderr


def test_run_without_native_kernels_where_that_is_allowed() -> None:
    done = without_native(LLMCORE_ALLOW_NO_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout  # the definition ran, the kernel could not


def test_table_tells_executed_from_skipped() -> None:
    ran = {("softmax", "cpu"): 3, ("softmax", "reference"): 2}
    skipped = {("softmax", "triton"): "no GPU", ("softmax", "cpu_avx2"): "this machine lacks AVX2"}
    lines = table(ran, skipped)
    assert lines[0].split() == ["triton", "cpu", "cpu_avx2", "reference"]
    assert lines[1].split() == ["softmax", "(1)", "3", "(2)", "2"]
    assert lines[2:4] == ["(1) no GPU", "(2) this machine lacks AVX2"]
    assert lines[4] == "executed: cpu, reference"
    assert lines[5].startswith("NOT executed: cuda, triton, torch, cpu_avx512_bf16")
    assert "cpu_avx2" in lines[5] and "reference" not in lines[5]


def test_summary_counts_launches_that_differ() -> None:
    recorder = Recorder()
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    for tensor in (x, y, x.T):  # the same call twice, and one with other strides
        recorder.add("triton softmax.forward_kernel", digest((1,), (tensor, 3)), 100)
    summary = Summary()
    summary.add("simulated", recorder.take())
    summary.add("interpreted", {"triton rope.turn_kernel": ([7], 0)})
    summary.add("interpreted", {"triton rope.turn_kernel": ([7, 8], 0)})  # by another test
    summary.add("fault_caught", ("triton rope.turn_kernel", "wrong_sign"))
    assert recorder.take() == {}
    rope, softmax = (line.split() for line in summary.lines()[1:])
    assert rope == ["triton", "rope.turn_kernel", "2", "-", "-", "1:", "wrong_sign"]
    assert softmax == ["triton", "softmax.forward_kernel", "-", "2", "300", "-"]
    assert Summary().lines() == []
