"""Loads the built extension and offers its ops as candidates, one for each instruction-set level.

A raw op is `torch.ops.llmcore.<op>_forward` or `_backward`, registered in csrc/register/<op>.cpp
over torch's stable ABI. Its first argument is the level. Raw ops are private: they know no
gradient, the contracts in `llmcore.ops` do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")
"""Every level there can be, best first; a build holds those of its architecture."""

BEST_LEVEL = -1
"""The level number that means: the best one this machine runs (csrc/levels.h)."""


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("llmcore._native"), ""
    except ModuleNotFoundError:
        return (
            None,
            "not built: there was no C++ compiler at the installation, or the build failed "
            "(install anew with LLMCORE_REQUIRE_NATIVE=1, and pip shows why)",
        )
    except ImportError as error:
        return None, f"not built for this torch: {error}"


module, why_not = _load()


def op(name: str) -> Callable[..., Any]:
    """The raw op torch.ops.llmcore.<name>; without the extension a call raises with the reason."""
    if module is None:

        def missing(*args: object) -> Any:
            raise RuntimeError(f"{name}: {why_not}")

        return missing
    return getattr(torch.ops.llmcore, name).default


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the shapes-only version of a raw op (for torch.compile, export)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if module is not None:
            torch.library.register_fake(f"llmcore::{name}", function)
        return function

    return register


def fake_into(name: str) -> None:
    """The same for the raw op <name>_forward_out, which writes into tensors that it is given."""
    fake(f"{name}_forward_out")(lambda *args: None)


def cuda_reason() -> str:
    """Why the extension has no CUDA kernels ("": it has)."""
    return why_not if module is None else module.CUDA_REASON


def bind(name: str, level: int) -> Callable[..., Any]:
    """A raw op at one level."""
    return functools.partial(op(name), level)


def refuses_tensors(
    *tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> list[str]:
    """Why the CPU kernels can't take these tensors; a None stands for an absent option."""
    devices = [t.device.type for t in tensors if t is not None and t.device.type != "cpu"]
    reasons = [f"a tensor on {kind}: these kernels run on the CPU" for kind in devices]
    return list(dict.fromkeys(reasons + refuses_kinds(*tensors, dtypes=dtypes)))


def refuses_kinds(
    *tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> list[str]:
    """Why native kernels can't take tensors of these dtypes and layouts, on whatever device."""
    reasons = []
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            names_of_all = f"{', '.join(names)} and {last}" if names else last
            reasons.append(f"{tensor.dtype}: the native kernels take {names_of_all}")
        if tensor.layout != torch.strided:
            reasons.append(f"layout {tensor.layout}: the native kernels take strided tensors")
    return list(dict.fromkeys(reasons))
