"""The build with CUDA, as far as it goes without a torch that has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import nvcc
import pytest
import setup_script
import torch

ROOT = Path(__file__).resolve().parents[2]
REGISTER = sorted((ROOT / "csrc" / "register").glob("*.cpp"))


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return setup_script.load()


def test_cuda_build_reasons(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCORE_CUDA", raising=False)
    assert "torch was a CPU build" in setup.cuda_reason(False)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert "no nvcc" in setup.cuda_reason(True)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/local/cuda/bin/{name}")
    assert setup.cuda_reason(True) == ""
    monkeypatch.setenv("LLMCORE_CUDA", "0")
    assert "LLMCORE_CUDA=0" in setup.cuda_reason(True)


def test_cuda_build_file(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA every .cu is compiled for every target and linked; without, none."""
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/local/cuda/bin/{name}")
    monkeypatch.setattr(setup, "cuda_toolkit", lambda: Path("/usr/local/cuda"))
    build = setup.NinjaBuild.__new__(setup.NinjaBuild)
    folder = Path(torch.__file__).parent
    with_cuda = build.ninja_file(Path("out.so"), folder, "")
    for name in nvcc.names():
        assert f"build cuda_{name}.o: nvcc " in with_cuda
    assert all(f"arch=compute_{target}" in with_cuda for target in setup.CUDA_TARGETS)
    assert "-lcudart_static" in with_cuda and "-DLLMCORE_CUDA " in with_cuda
    without = build.ninja_file(Path("out.so"), folder, "not built: why")
    assert "cuda_rms_norm.o" not in without and "-DLLMCORE_CUDA " not in without


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("source", REGISTER, ids=lambda path: path.stem)
def test_cuda_build_registration_compiles(source: Path) -> None:
    """Against the stable ABI's headers, which a CPU build of torch has too."""
    includes = [str(Path(torch.__file__).parent / "include"), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLLMCORE_CUDA", "-DUSE_CUDA"]
    command = ["g++", *flags, *defines, *(f"-isystem{path}" for path in includes), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert run.returncode == 0, run.stderr
