"""Every Triton kernel in the simulator: the code that a GPU would run, not the interpreter's
reading of it. simulate_triton.py does the work."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmcore.dispatch import REGISTRY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
NAMES = [name for name, op in REGISTRY.items() if op.candidate("triton") is not None]


@functools.cache
def simulate(*options: str) -> dict[str, dict[str, Any]]:
    """What the script printed, by op."""
    script = Path(__file__).with_name("simulate_triton.py")
    # FP fusion's default changes in Triton 3.10: what is tested is the one that is stated.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(script), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {line["op"]: line for line in map(json.loads, run.stdout.splitlines())}


def hold(found: dict[str, Any], record_property: Any) -> None:
    record_property("simulated", f"{found['op']}/triton/{found['samples']}")
    for kernel, count in found["instructions"].items():
        record_property("instructions", f"{kernel}/triton/{count}")
    assert not found["failures"] and not found["skipped"], found


@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_small(name: str, record_property: Any) -> None:
    hold(simulate("--largest", "6000", "--count", "3")[name], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_samples(name: str, dtype: str, record_property: Any) -> None:
    hold(
        simulate("--dtype", dtype, "--largest", "40000", "--count", "12", name)[name],
        record_property,
    )
