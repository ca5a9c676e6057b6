"""What this machine is: the one place that asks.

CPU instruction sets are asked once, in csrc/levels.cpp, where the kernels' levels are compiled;
this module hands on the answer, and knows about GPUs and their compilers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import platform

import torch

from llmcore import native


@functools.cache
def cpu_levels() -> dict[str, str]:
    """Each level of the build, worst first, with what this machine lacks for it ("": it runs)."""
    return {} if native.module is None else dict(native.module.levels())


def best_cpu_level() -> str | None:
    """The level that `cpu` stands for here: the best one that runs, None without native kernels."""
    runs = [level for level, lacks in cpu_levels().items() if not lacks]
    return runs[-1] if runs else None


@functools.cache
def cpu_name() -> str:
    """The CPU's own name, as the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def cuda_reason() -> str | None:
    """Why no CUDA kernel can run here, or None when there is a GPU that torch can use."""
    if not torch.backends.cuda.is_built():
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


@functools.cache
def _name_of_gpu(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def gpu_name(x: torch.Tensor | None) -> str:
    """The name of the GPU that a tensor is on, "" for any other."""
    if x is None or not x.is_cuda or cuda_reason() is not None:
        return ""
    return _name_of_gpu(x.device.index)


def cuda_kernels_reason() -> str:
    """Why the extension's CUDA kernels can't run here, "" when they can."""
    return cuda_reason() or native.cuda_reason()


def triton_is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton kernels run on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_reason() -> str | None:
    """Why no Triton kernel can run here, or None. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if triton_is_interpreted():
        return None
    reason = cuda_reason()
    return reason and f"{reason} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
