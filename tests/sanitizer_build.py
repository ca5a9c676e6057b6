"""tests/native/exercise.cpp under a sanitizer."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import setup_script

from llmcore import device

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")


def build(
    folder: Path, sanitizer: str, levels: Sequence[str], run: Callable[[list[str]], object]
) -> Path:
    """The program exercise, with these levels, under one -fsanitize.

    `run` takes a command, and raises where it fails.
    """
    setup = setup_script.load()
    # Not optimised: -O1 takes the compiler five times as long, and the program less.
    compiler = [str(COMPILER), "-std=c++17", "-g", "-O0", "-Wno-psabi"]
    compiler += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    compiler += [f"-DLLMCORE_LEVELS(X)={' '.join(f'X({level})' for level in levels)}"]
    jobs = [
        (ROOT / "csrc" / "levels.cpp", "levels", []),
        (ROOT / "csrc" / "team.cpp", "team", []),
        (ROOT / "tests/native/exercise.cpp", "exercise", []),
    ]
    for level in levels:
        for source in setup.kernel_sources():
            flags = setup.LEVELS[level]
            options = [*setup.KERNEL, *flags, f"-DLLMCORE_LEVEL={level}"]
            jobs.append((source, f"{level}_{source.stem}", options))

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        target = str(folder / f"{name}.o")
        run([*compiler, *flags, "-c", str(source), "-o", target])
        return target

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "exercise"
    run([*compiler, *objects, "-pthread", "-o", str(program)])
    return program


def levels() -> list[str]:
    """Every level that this build has, best first."""
    return [*reversed(setup_script.load().LEVELS)]


def best_level() -> str:
    return device.best_cpu_level() or "portable"
