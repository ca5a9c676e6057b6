"""tests/native/exercise.cpp under a sanitizer, which takes the compiler minutes: the program of the
default run is built beside the other tests, at a low priority."""

from __future__ import annotations

import concurrent.futures
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import setup_script

from llmcore import device

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
FIXTURE = "sanitized_program"
AHEAD = pytest.StashKey[concurrent.futures.Future[Path]]()


def build(
    folder: Path, sanitizer: str, levels: Sequence[str], stop: threading.Event | None = None
) -> Path:
    """The program exercise, with these levels, under one -fsanitize.

    With a `stop`, at a low priority, and no further than the files at work when it is set.
    """
    before = [] if stop is None else ["nice", "-n", "10"]
    setup = setup_script.load()
    common = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    common += ["-Wno-psabi", f"-DLLMCORE_LEVELS(X)={' '.join(f'X({level})' for level in levels)}"]
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
        assert stop is None or not stop.is_set(), "the tests are over"
        target = str(folder / f"{name}.o")
        command = [*before, str(COMPILER), *common, *flags, "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "exercise"
    subprocess.run([str(COMPILER), *common, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def levels() -> list[str]:
    """Every level that this build has, best first."""
    return [*reversed(setup_script.load().LEVELS)]


def best_level() -> str:
    return device.best_cpu_level() or "portable"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to build as soon as it is known that the program will be wanted."""
    wanted = any(FIXTURE in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or COMPILER is None or session.config.option.collectonly:
        return
    ahead = concurrent.futures.ThreadPoolExecutor(1)
    folder = tempfile.TemporaryDirectory()
    stop = threading.Event()
    for cleanup in (folder.cleanup, ahead.shutdown, stop.set):  # the last one comes first
        session.config.add_cleanup(cleanup)
    session.config.stash[AHEAD] = ahead.submit(
        build, Path(folder.name), "address,undefined", [best_level()], stop
    )


@pytest.fixture(scope="session")
def sanitized_program(pytestconfig: pytest.Config) -> Path:
    """exercise under the address and the undefined sanitizer, of the level that runs here."""
    return pytestconfig.stash[AHEAD].result()
