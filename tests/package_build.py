"""The package as the installation's tests want it: a source distribution of a copy of the checkout,
what it unpacks to, and a wheel built from that."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("csrc", "kernels", "llmcore", "scripts", "tests")
FILES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
)


class Package(NamedTuple):
    """The source tree that the sdist holds (what is missing there is missing for everybody), and
    the wheel."""

    unpacked: Path
    wheel: Path


def environment(**extra: str) -> dict[str, str]:
    """The process's own, without what steers llmcore. One level is built and not optimised: of the
    same sources as all, which would take the compiler minutes, and whose warnings they show."""
    dropped = ("PYTHONPATH", "LLMCORE_BACKEND", "LLMCORE_REQUIRE_NATIVE", "LLMCORE_WERROR")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    quick = f'exec {os.environ.get("CXX", "g++")} "$@" -O0'
    return {
        **kept,
        "LLMCORE_LEVELS": "portable",
        "CXX": shlex.join(["sh", "-c", quick, "c++"]),
    } | extra


def build(folder: Path, run: Callable[..., object]) -> Package:
    """`run` takes a command and an environment, and raises where the command fails."""
    copy = folder / "llmcore"
    copy.mkdir()
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    tool = [sys.executable, "-m", "build", "--no-isolation"]
    run([*tool, "--sdist", str(copy)], environment())
    sdist = next((copy / "dist").glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    unpacked = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    run([*tool, "--wheel", str(unpacked)], environment())
    return Package(unpacked, next((unpacked / "dist").glob("*.whl")))
