"""Triton kernels of some ops, compiled as their launcher would compile them, their PTX executed in
the simulator against the ops' definitions: a line of JSON for each op.

    TRITON_INTERPRET=0 python tests/gpu/simulate_triton.py --dtype bfloat16 --largest 40000 rms_norm

A process of its own, for the test process has Triton's interpreter, which compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ptxsim
import simulated
import triton_driver

from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import verify_backend


def execute(compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    stats = ptxsim.launch_triton(compiled, grid, [*arguments])
    simulated.record(compiled.metadata.name, stats)


def size_of(sample: Sample) -> int:
    return sum(a.numel() for a in sample.args if torch.is_tensor(a))


def run(name: str, dtype: str, largest: int, count: int) -> dict[str, Any]:
    """What verification says of the op's smallest samples, and the instructions of its kernels."""
    op = REGISTRY[name]
    samples = sorted((s for s in op.samples(Draw(0)) if size_of(s) <= largest), key=size_of)
    chosen = samples[:: max(len(samples) // count, 1)][:count]
    before = simulated.instructions.copy()
    try:
        with triton_driver.on_gpu(triton_driver.SimulatedGPU("sm_80", execute)):
            line = verify_backend(op, "triton", getattr(torch, dtype), chosen)
        found = {"samples": line.samples, "failures": line.failures, "skipped": line.skipped}
    except Exception as error:  # a fault of the kernel: which it is stands in the report
        found = {"samples": 0, "failures": [f"{type(error).__name__}: {error}"], "skipped": ""}
    return {"op": name, "instructions": simulated.instructions - before, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--largest", type=int, default=10**9)
    parser.add_argument("--count", type=int, default=10**9)
    options = parser.parse_args()
    names = [name for name, op in REGISTRY.items() if op.candidate("triton") is not None]
    for name in options.ops or names:
        print(json.dumps(run(name, options.dtype, options.largest, options.count)), flush=True)


if __name__ == "__main__":
    main()
