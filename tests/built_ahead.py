"""What takes the compiler minutes and is wanted late in a run: it is built beside the other tests,
at a low priority. tests/conftest.py takes the hook and the fixtures in."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import package_build
import pytest
import sanitizer_build

AHEAD = pytest.StashKey[dict[str, concurrent.futures.Future[Any]]]()


class Runner:
    """Runs commands at a low priority, until the tests are over."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def __call__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        assert not self.stop.is_set(), "the tests are over"
        process = subprocess.Popen(
            ["nice", "-n", "10", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        output = None
        while output is None:
            try:
                output = process.communicate(timeout=0.5)[0]
            except subprocess.TimeoutExpired:
                if self.stop.is_set():
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output[-8000:]


def build_package(folder: Path, run: Runner) -> package_build.Package:
    return package_build.build(folder, run)


def build_sanitized_program(folder: Path, run: Runner) -> Path:
    best = sanitizer_build.best_level()
    return sanitizer_build.build(folder, "address,undefined", [best], run)


BUILDERS: dict[str, tuple[Callable[[Path, Runner], Any], bool]] = {
    "package": (build_package, importlib.util.find_spec("build") is not None),
    "sanitized_program": (build_sanitized_program, sanitizer_build.COMPILER is not None),
}
"""By fixture, in the order of the tests: who builds it, and whether there are tools for it here."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins as soon as it is known what will be wanted."""
    if session.config.option.collectonly:
        return
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    pool, run = concurrent.futures.ThreadPoolExecutor(1), Runner()
    folder = tempfile.TemporaryDirectory()
    # The last one comes first: nobody writes any more when the folder goes.
    for cleanup in (folder.cleanup, pool.shutdown, run.stop.set):
        session.config.add_cleanup(cleanup)
    session.config.stash[AHEAD] = {}
    for name, (build, possible) in BUILDERS.items():
        if name in wanted and possible:
            place = Path(folder.name) / name
            place.mkdir()
            session.config.stash[AHEAD][name] = pool.submit(build, place, run)


@pytest.fixture(scope="session")
def package(pytestconfig: pytest.Config) -> package_build.Package:
    """The source tree of an sdist, and a wheel built from it."""
    pytest.importorskip("build")
    return pytestconfig.stash[AHEAD]["package"].result()


@pytest.fixture(scope="session")
def sanitized_program(pytestconfig: pytest.Config) -> Path:
    """exercise under the address and the undefined sanitizer, of the level that runs here."""
    return pytestconfig.stash[AHEAD]["sanitized_program"].result()
