"""setup.py as a module: the kernels' sources, levels and flags, and why there is no CUDA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """A fresh one."""
    spec = importlib.util.spec_from_file_location("llmcore_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
