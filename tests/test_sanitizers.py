"""The native kernels under the sanitizers: tests/native/exercise.cpp must run clean with each."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not on this machine")


def build_flags() -> ModuleType:
    """setup.py as a module: the kernels' sources, levels and flags."""
    spec = importlib.util.spec_from_file_location("llmcore_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, sanitizer: str) -> Path:
    """The program exercise, with all levels, under one -fsanitize."""
    setup = build_flags()
    common = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    common.append("-Wno-psabi")
    jobs = [
        (ROOT / "csrc" / "levels.cpp", "levels", []),
        (ROOT / "tests/native/exercise.cpp", "exercise", []),
    ]
    for level, flags in setup.LEVELS.items():
        for source in setup.kernel_sources():
            options = [*setup.KERNEL, *flags, f"-DLLMCORE_LEVEL={level}"]
            jobs.append((source, f"{level}_{source.stem}", options))

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        target = str(folder / f"{name}.o")
        command = [str(COMPILER), *common, *flags, "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "exercise"
    subprocess.run([str(COMPILER), *common, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def run_clean(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    lines = done.stdout.splitlines()
    assert lines and all("ran" in line or "not run" in line for line in lines), done.stdout
    assert "portable: ran" in lines
    print(done.stdout)


def test_kernels_address_undefined(tmp_path: Path) -> None:
    run_clean(build(tmp_path, "address,undefined"))


@pytest.mark.slow
def test_kernels_thread(tmp_path: Path) -> None:
    run_clean(build(tmp_path, "thread"))


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
