"""nvcc without a GPU: PTX and machine code of csrc/cuda, and of edited copies with a fault in them.

What was compiled is kept under build/gpu, named by all that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "gpu"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings")


@dataclass(frozen=True)
class Edit:
    """A change of one source file's text, which must be there exactly once."""

    file: str
    old: str
    new: str


def why_not() -> str:
    """Why CUDA sources can't be compiled here; empty when they can."""
    return "" if shutil.which("nvcc") else "nvcc is not installed"


@functools.cache
def version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def names() -> list[str]:
    """The ops that have a CUDA body."""
    return sorted(path.stem for path in CUDA.glob("*.cu"))


def sources(edits: Sequence[Edit] = ()) -> dict[str, str]:
    """Every file that a kernel may include, by its path below csrc, edited."""
    paths = [*CUDA.iterdir(), ROOT / "csrc" / "ops.h"]
    texts = {str(path.relative_to(ROOT / "csrc")): path.read_text() for path in sorted(paths)}
    for edit in edits:
        name = f"cuda/{edit.file}"
        count = texts[name].count(edit.old)
        assert count == 1, f"{edit.file} has {count} of {edit.old!r}, expected 1"
        texts[name] = texts[name].replace(edit.old, edit.new)
    return texts


def place(name: str, kind: str, texts: dict[str, str], flags: Sequence[str]) -> Path:
    """The folder of a compilation, its sources in it; a file `done` marks one that succeeded."""
    parts = [version(), name, kind, *flags]
    for file, text in texts.items():
        # Another op's body is not part of this one.
        if not file.endswith(".cu") or Path(file).stem == Path(name).stem:
            parts += [file, text]
    folder = CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def compile_once(name: str, kind: str, edits: Sequence[Edit], flags: Sequence[str]) -> Path:
    folder = place(name, kind, sources(edits), flags)
    if not (folder / "done").exists():
        command = ["nvcc", *FLAGS, *flags, str(folder / "cuda" / f"{name}.cu")]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        (folder / "log").write_text(run.stdout + run.stderr)
        (folder / "done").touch()
    return folder


@dataclass(frozen=True)
class Host:
    """An op's launchers, as an object file, and its kernels, as PTX."""

    object: Path
    ptx: str


def own_target(name: str) -> str | None:
    """The one target that a source is for, where its name says so: 90a of attention_sm90."""
    found = re.search(r"_sm(\d+)$", name)
    return f"{found.group(1)}a" if found else None


def host(name: str, edits: Sequence[Edit] = ()) -> Host:
    """Host code and PTX for sm_80, or the source's own target, in one run of the compiler; no
    machine code is made."""
    target = f"compute_{own_target(name) or 80}"
    flags = [f"-arch={target}", f"-code={target}", "-keep", "-Xcompiler", "-fPIC"]
    folder = compile_once(name, "host", edits, [*flags, "-c", "-o", "host.o"])
    return Host(folder / "host.o", (folder / f"{name}.ptx").read_text())


def hosts(chosen: Sequence[str], edits: Sequence[Edit] = ()) -> dict[str, Host]:
    """`host` of several ops, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(chosen, pool.map(lambda name: host(name, edits), chosen), strict=True))


def cubin(name: str, capability: int) -> Path:
    """Machine code for sm_<capability>; the file `log` beside it holds what ptxas said."""
    target = own_target(name) or str(capability)
    flags = [f"-arch=sm_{target}", "-Xptxas", "-v", "-cubin", "-o", "code.cubin"]
    return compile_once(name, "cubin", (), flags) / "code.cubin"


def sample(name: str, *defines: str) -> str:
    """PTX of tests/gpu/samples/<name>, kernels that try the simulator itself."""
    text = (ROOT / "tests" / "gpu" / "samples" / name).read_text()
    flags = ["-arch=sm_80", "-ptx", *[f"-D{define}" for define in defines], "-o", "sample.ptx"]
    folder = place(name, "sample", {f"cuda/{name}": text}, flags)
    if not (folder / "sample.ptx").exists():
        command = ["nvcc", "-lineinfo", *flags, str(folder / "cuda" / name)]
        subprocess.run(command, cwd=folder, check=True)
    return (folder / "sample.ptx").read_text()
