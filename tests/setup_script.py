"""setup.py as a module: the kernels' sources, levels and flags, and why there is no CUDA; and the
objects that it built here."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """A fresh one."""
    spec = importlib.util.spec_from_file_location("llmcore_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_objects() -> dict[str, Path]:
    """The kernels as they are in the library: optimised, by setup.py's own build. By their names,
    <level>_<source>."""
    setup = load()
    folder = ROOT / "build" / f"native-{sysconfig.get_platform()}"
    names = [
        f"{level}_{source.stem}" for level in setup.LEVELS for source in setup.kernel_sources()
    ]
    found = {name: folder / f"{name}.o" for name in names}
    missing = [name for name, path in found.items() if not path.is_file()]
    if missing:
        pytest.skip(f"not built in this checkout: {missing[0]} and {len(missing) - 1} more")
    return found
