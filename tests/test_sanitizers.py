"""The native kernels under the sanitizers and between guard pages: tests/native/exercise.cpp must
run clean with each."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import setup_script
from sanitizer_build import COMPILER, ROOT, best_level, build, levels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not on this machine")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]


def run_clean(program: Path, must_run: str = "portable", **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    lines = done.stdout.splitlines()
    assert lines and all("ran" in line or "not run" in line for line in lines), done.stdout
    assert f"{must_run}: ran" in lines
    print(done.stdout)


def test_kernels_address_undefined(sanitized_program: Path) -> None:
    """Of the level that runs here; the others take their minutes in the full sweep."""
    run_clean(sanitized_program, best_level())


@pytest.mark.slow
def test_kernels_address_undefined_other_levels(tmp_path: Path) -> None:
    others = [level for level in levels() if level != best_level()]
    run_clean(build(tmp_path, "address,undefined", others, run), others[-1])


@pytest.mark.slow
def test_kernels_thread(tmp_path: Path) -> None:
    run_clean(build(tmp_path, "thread", levels(), run))


def test_sanitizer_finds_a_planted_fault(tmp_path: Path) -> None:
    """The build does watch: one element past a heap buffer ends the program."""
    source = tmp_path / "fault.cpp"
    source.write_text("int main(int n, char**) { float* x = new float[4]; return int(x[n + 3]); }")
    program = tmp_path / "fault"
    command = [str(COMPILER), "-fsanitize=address,undefined", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="module")
def guarded_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program exercise on the library's own kernels, its arrays between guard pages."""
    program = tmp_path_factory.mktemp("guard") / "exercise"
    sources = [ROOT / "tests/native" / name for name in ("exercise.cpp", "guard_pages.cpp")]
    kernels = setup_script.built_objects()
    beside = [next(iter(kernels.values())).with_name(f"{name}.o") for name in ("levels", "team")]
    command = [COMPILER, "-std=c++17", "-O1", "-Wno-psabi", *sources, *beside, *kernels.values()]
    subprocess.run([*map(str, command), "-pthread", "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("side", ["end", "start"])
def test_kernels_between_guard_pages(side: str, guarded_program: Path) -> None:
    run_clean(guarded_program, LLMCORE_GUARD=side)


@pytest.mark.parametrize(("side", "index"), [("end", 4), ("start", -1)])
def test_guard_pages_find_a_planted_fault(side: str, index: int, tmp_path: Path) -> None:
    """One element past an array's end, or before its start, ends the program."""
    source, program = tmp_path / "fault.cpp", tmp_path / "fault"
    source.write_text(
        "int main(int n, char**) { volatile float* x = new float[4]; x[0] = x[3] = 1;"
        f" if (n > 1) return int(x[{index}]); delete[] x; }}"
    )
    guard = ROOT / "tests/native/guard_pages.cpp"
    subprocess.run([str(COMPILER), str(source), str(guard), "-o", str(program)], check=True)
    environment = {**os.environ, "LLMCORE_GUARD": side}
    ends = [subprocess.run([program, *more], env=environment).returncode for more in ([], ["x"])]
    assert ends == [0, -signal.SIGSEGV]
