"""Installs PyTorch into the running environment: its CPU build, or its CUDA build where a GPU is.

Usage: python scripts/install_torch.py [REQUIREMENT]

On Linux the package index serves the CUDA build, several GB, by default. Without a GPU this asks
pip what it would install, and if that is CUDA, leaves the choice of the CPU build to uv, which
knows PyTorch's own indexes. A torch that satisfies the requirement already is left alone.
"""

import json
import shutil
import subprocess
import sys
from importlib import metadata

REQUIREMENT = "torch==2.13.0"


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    capture = "--dry-run" in arguments
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )


def installed(requirement: str) -> bool:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip_would_install_cuda(requirement: str) -> bool:
    report = pip("install", "--quiet", "--dry-run", "--report", "-", requirement).stdout
    names = {entry["metadata"]["name"].lower() for entry in json.loads(report)["install"]}
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def main() -> None:
    requirement = sys.argv[1] if len(sys.argv) > 1 else REQUIREMENT
    pip("install", "--quiet", "packaging")
    if installed(requirement):
        return
    if has_gpu() or not pip_would_install_cuda(requirement):
        pip("install", requirement)
        return
    pip("install", "--quiet", "uv")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    subprocess.run([*uv, "--torch-backend", "cpu", requirement], check=True)


if __name__ == "__main__":
    main()
