"""Builds llmcore with its CUDA kernels against a torch that has CUDA and imports it, without a GPU.

    python scripts/check_cuda_build.py [--torch 2.13.0] [--folder build/cuda-check]

Everything goes into an environment of its own, which is removed at the end (about 5 GB; minutes of
download and of nvcc). Not part of the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOOK = """
import torch
from llmcore import device, native
from llmcore.dispatch import REGISTRY

assert torch.backends.cuda.is_built(), "this torch is a CPU build"
assert native.cuda_reason() == "", native.cuda_reason()
names = [name for name, op in REGISTRY.items() if op.candidate("cuda") is not None]
assert names
for name in names:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"llmcore::{name}_forward", "CUDA")
    assert has, f"llmcore::{name}_forward has no CUDA kernel"
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: {len(names)} ops have CUDA kernels,")
print(f"{', '.join(names)}; here: {device.cuda_kernels_reason() or 'a GPU is there'}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="2.13.0", help="the version of PyPI, which has CUDA")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cuda-check")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not installed")
    shutil.rmtree(options.folder, ignore_errors=True)
    try:
        check(options.folder, options.torch)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


def check(folder: Path, version: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    # "===" means this version as it is written: "2.13.0+cpu" counts as 2.13.0 otherwise.
    tools = ["numpy", "setuptools", "wheel", "pybind11", "ninja"]
    subprocess.run([*install, f"torch==={version}", *tools], check=True)
    # As the README's installation does it, but nothing less than the native kernels will do.
    environment = {**os.environ, "LLMCORE_REQUIRE_NATIVE": "1"}
    environment.pop("PYTHONPATH", None)
    build = [*install, "--verbose", "--no-build-isolation", str(ROOT)]
    subprocess.run(build, check=True, env=environment)
    subprocess.run([python, "-c", LOOK], check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main()
