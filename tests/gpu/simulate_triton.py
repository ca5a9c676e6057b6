"""Triton kernels of some ops, compiled as their launcher would compile them, their PTX executed in
the simulator against the ops' definitions: a line of JSON for each op, or for each planted fault.

    TRITON_INTERPRET=0 python tests/gpu/simulate_triton.py --dtype bfloat16 --largest 40000 rms_norm
    TRITON_INTERPRET=0 python tests/gpu/simulate_triton.py --faults mask_off_by_one

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
import simulated_calls
import triton_driver
from kernel_counts import Recorder, digest
from triton_faults import FAULTS, planted

from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import verify_backend

executed = Recorder()


def execute(launch: triton_driver.Launch) -> None:
    stats = ptxsim.launch_triton(launch.compiled, launch.grid, [*launch.arguments])
    what = digest(launch.grid, launch.arguments, launch.constants)
    executed.add(f"triton {launch.kernel}", what, stats.instructions)


def size_of(sample: Sample) -> int:
    return sum(a.numel() for a in sample.args if torch.is_tensor(a))


def smallest(name: str, largest: int, count: int) -> list[Sample]:
    """So many of an op's small samples, from the smallest on; at least the ones that are named."""
    named = simulated_calls.samples(name)
    every = [s for s in REGISTRY[name].samples(Draw(0)) if size_of(s) <= largest]
    every = sorted((s for s in every if s.name not in {n.name for n in named}), key=size_of)
    count = max(count - len(named), 0)
    return [*every[:: max(len(every) // max(count, 1), 1)][:count], *named]


def verify(name: str, dtype: str, samples: list[Sample]) -> dict[str, Any]:
    """What verification says of the samples, and what was executed for it."""
    executed.take()
    try:
        with triton_driver.on_gpu(triton_driver.SimulatedGPU("sm_80", execute)):
            line = verify_backend(REGISTRY[name], "triton", getattr(torch, dtype), samples)
        found = {"samples": line.samples, "failures": line.failures, "skipped": line.skipped}
    except Exception as error:  # a fault of the kernel: which it is stands in the report
        found = {"samples": 0, "failures": [f"{type(error).__name__}: {error}"], "skipped": ""}
    return {"op": name, "simulated": executed.take(), **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--largest", type=int, default=10**9)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--whole-tiles", action="store_true")
    parser.add_argument("--faults", nargs="+", choices=FAULTS)
    options = parser.parse_args()
    for fault in options.faults or ():
        with planted(FAULTS[fault]):
            found = verify(FAULTS[fault].op, options.dtype, [FAULTS[fault].sample()])
        print(json.dumps({"fault": fault, **found}), flush=True)
    if options.faults:
        return
    names = [name for name, op in REGISTRY.items() if op.candidate("triton") is not None]
    for name in options.ops or names:
        samples = smallest(name, options.largest, options.count)
        if options.whole_tiles:
            samples = simulated_calls.whole_tiles(name)
        print(json.dumps(verify(name, options.dtype, samples)), flush=True)


if __name__ == "__main__":
    main()
