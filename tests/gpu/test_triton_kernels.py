"""Every Triton kernel in the simulator: the code that a GPU would run, not the interpreter's
reading of it. simulate_triton.py does the work. And faults planted in the kernels, which the tests
must find, in the interpreter and in the simulator."""

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
import torch
from triton_faults import FAULTS, planted
from triton_interpreter import prepare

from llmcore import device
from llmcore.dispatch import REGISTRY
from llmcore.verify import verify_backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
NAMES = [name for name, op in REGISTRY.items() if op.candidate("triton") is not None]


@functools.cache
def simulate(*options: str) -> tuple[dict[str, Any], ...]:
    """What the script printed, line by line."""
    script = Path(__file__).with_name("simulate_triton.py")
    # FP fusion's default changes in Triton 3.10: what is tested is the one that is stated.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(script), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(map(json.loads, run.stdout.splitlines()))


def hold(name: str, record_property: Any, *options: str) -> None:
    found = next(line for line in simulate(*options) if line["op"] == name)
    record_property("simulated", found["simulated"])
    assert not found["failures"] and not found["skipped"], found
    assert found["samples"] and found["simulated"], found


@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_small(name: str, record_property: Any) -> None:
    """One small call of each op, and the calls of simulated_calls.py."""
    hold(name, record_property, "--largest", "3000", "--count", "2")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_samples(name: str, dtype: str, record_property: Any) -> None:
    hold(name, record_property, "--dtype", dtype, "--largest", "40000", "--count", "12")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_triton_kernels_whole_tiles(name: str, dtype: str, record_property: Any) -> None:
    """The widths and tiles that people run; the contracts' samples are narrower."""
    hold(name, record_property, "--dtype", dtype, "--whole-tiles", name)


def record_fault(name: str, where: str, record_property: Any) -> None:
    record_property("fault_caught", (f"triton {FAULTS[name].kernel}", f"{name} ({where})"))


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.bounds])
def test_triton_kernels_planted_fault(name: str, record_property: Any) -> None:
    """The interpreter has no bounds, but numbers that are wrong are found there, quickly."""
    if not device.triton_is_interpreted():
        pytest.skip("Triton's kernels run on a GPU here")
    prepare()
    fault = FAULTS[name]
    op, sample = REGISTRY[fault.op], fault.sample()
    assert not verify_backend(op, "triton", torch.float32, [sample]).failures
    with planted(fault):
        line = verify_backend(op, "triton", torch.float32, [sample])
    assert line.failures and not line.skipped, name
    record_fault(name, "interpreter", record_property)


BOUNDS = tuple(name for name, fault in FAULTS.items() if fault.bounds)


@pytest.mark.parametrize("name", BOUNDS)
def test_triton_kernels_planted_bound(name: str, record_property: Any) -> None:
    """An access outside of a tensor is told as one by the simulator."""
    line = next(line for line in simulate("--faults", *BOUNDS) if line["fault"] == name)
    assert line["failures"] and line["failures"][0].startswith("OutOfBounds"), line
    record_fault(name, "simulator: out of bounds", record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.bounds])
def test_triton_kernels_planted_fault_compiled(name: str, record_property: Any) -> None:
    """The same faults in the code that a GPU would run; in float32 as well, for bfloat16's rounding
    hides what is small."""
    others = [name for name, fault in FAULTS.items() if not fault.bounds]
    lines = simulate("--dtype", "float32", "--faults", *others)
    line = next(line for line in lines if line["fault"] == name)
    assert line["failures"] and not line["skipped"], line
    record_fault(name, "simulator", record_property)
