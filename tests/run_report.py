"""Hooks of every test run: native kernels must be there where they can be, and the run says what it
executed. tests/conftest.py takes them in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from kernel_counts import Summary

from llmcore import device, dispatch, native


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fails the run when native kernels could be there and are not: skips would read as passes."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    compiler = next(filter(shutil.which, names), None)
    allowed = os.environ.get("LLMCORE_ALLOW_NO_NATIVE") == "1"
    if native.module is None and compiler is not None and not allowed:
        pytest.exit(
            f"{compiler} is on this machine, but the native kernels did not load: "
            f"{native.why_not} (make build, or LLMCORE_ALLOW_NO_NATIVE=1 to test without)",
            returncode=1,
        )


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test starts from one seed; it leaves threads and the forced backend as they were."""
    threads, forced = torch.get_num_threads(), dispatch.forced
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    assert dispatch.forced == forced


@pytest.fixture
def one_thread() -> None:
    """For tests on small tensors: faster, and far steadier where other processes are at work."""
    torch.set_num_threads(1)


@pytest.fixture(params=["best", "reference"])
def backend(request: pytest.FixtureRequest, one_thread: None) -> Iterator[str]:
    """The test of an op runs on what this machine chooses, and on the definition.

    The op is the one that the test file's name begins with: the longest, for there are
    attention_varlen and attention_bits.
    """
    if request.param == "best":
        name = request.module.__name__.removeprefix("test_")
        name = "attention" if name == "scaled_dot_product_attention" else name
        op = dispatch.REGISTRY[max(filter(name.startswith, dispatch.REGISTRY), key=len)]
        candidate = op.candidate("cpu")
        if why := op.why_absent("cpu") if candidate is None else candidate.machine:
            pytest.skip(why)
        yield "best"
        return
    with dispatch.use("reference"):
        yield "reference"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many random cases there were; a table of the candidates that ran, or why they did not."""
    report_random_cases(terminalreporter)
    report_kernels(terminalreporter)
    ran: dict[tuple[str, str], int] = {}
    skipped: dict[tuple[str, str], str] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            candidate = dict(report.user_properties).get("candidate")
            if candidate is None:
                continue
            op, backend = candidate.split("/")
            if outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                skipped[op, backend] = reason.removeprefix("Skipped: ")
            else:
                ran[op, backend] = ran.get((op, backend), 0) + 1
    if not ran and not skipped:
        return
    terminalreporter.section("candidates: tests that ran, or why none did")
    for line in table(ran, skipped):
        terminalreporter.write_line(line)


def report_random_cases(terminalreporter: pytest.TerminalReporter) -> None:
    """The random cases that were held to the yardstick, and how many of them for each op."""
    counts: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "random_cases":
                    op, count = value.split("/")
                    counts[op] = counts.get(op, 0) + int(count)
    if counts:
        listed = ", ".join(f"{op} {count:,}" for op, count in sorted(counts.items()))
        terminalreporter.section(f"random cases held to the yardstick: {sum(counts.values()):,}")
        terminalreporter.write_line(listed)


def report_kernels(terminalreporter: pytest.TerminalReporter) -> None:
    """Of each GPU kernel: launches in Triton's interpreter and in the simulator, faults caught."""
    summary = Summary()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for kind, value in report.user_properties:
                if kind in Summary.KINDS:
                    summary.add(kind, value)
    if lines := summary.lines():
        terminalreporter.section(
            "GPU kernels without a GPU: launches that differ, thread instructions, planted faults"
        )
        for line in lines:
            terminalreporter.write_line(line)


def table(ran: dict[tuple[str, str], int], skipped: dict[tuple[str, str], str]) -> list[str]:
    """The lines of the summary: ops by backends, the reasons numbered below."""
    pairs = ran.keys() | skipped.keys()
    ops = sorted({op for op, _ in pairs})
    backends = [b for b in dispatch.BACKENDS if any(pair[1] == b for pair in pairs)]
    width = max(map(len, ops))
    notes: dict[str, int] = {}
    lines = [" ".join([" " * width, *backends])]
    for op in ops:
        cells = []
        for backend in backends:
            if (op, backend) in ran:
                cell = str(ran[op, backend])
            else:
                why = skipped.get((op, backend), "not selected")
                cell = f"({notes.setdefault(why, len(notes) + 1)})"
            cells.append(f"{cell:<{len(backend)}}")
        lines.append(" ".join([f"{op:<{width}}", *cells]).rstrip())
    lines += [f"({number}) {why}" for why, number in notes.items()]
    executed = [b for b in backends if any(pair[1] == b for pair in ran)]
    not_executed = [b for b in dispatch.BACKENDS if b not in executed]
    if "triton" in executed and device.triton_is_interpreted():
        lines.append("triton ran in its interpreter, on the CPU")
    lines.append(f"executed: {', '.join(executed) or 'nothing'}")
    lines.append(f"NOT executed: {', '.join(not_executed) or 'nothing'}")
    return lines
