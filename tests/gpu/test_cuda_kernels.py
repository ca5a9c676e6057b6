"""Every CUDA kernel, its PTX executed instruction by instruction, against its op's definition.

The launchers' host code runs too. A test fails for an access outside of a tensor, an uninitialised
read, a race between barriers or a misaligned address as well as for a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import nvcc
import ptxsim
import pytest
import simulated_ops
import torch
from simulated import Library, instructions

from llmcore import dispatch
from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw
from llmcore.verify import verify_backend

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())


@cache
def library() -> Library:
    return Library(list(simulated_ops.BINDINGS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", simulated_ops.BINDINGS)
def test_cuda_kernels_samples(name: str, dtype: str, record_property) -> None:
    """The contract's own samples: results and gradients within the yardstick."""
    op = REGISTRY[name]
    before = instructions.copy()
    with simulated_ops.installed(library(), name):
        line = verify_backend(op, "cuda", getattr(torch, dtype), list(op.samples(Draw(0))))
    record_property("simulated", f"{name}/cuda/{line.samples}")
    for kernel, count in (instructions - before).items():
        record_property("instructions", f"{kernel}/cuda/{count}")
    assert not line.failures and not line.skipped, str(line)


@dataclass(frozen=True)
class Fault:
    """An edit of an op's source, what it must be caught as, and the input that shows it."""

    op: str
    edit: nvcc.Edit
    caught: type[ptxsim.KernelFault] | tuple[type[ptxsim.KernelFault], ...]
    shape: tuple[int, ...]


NO_BARRIER = nvcc.Edit("reduce.cuh", "  __syncthreads();\n", "")
HALF_A_WARP = nvcc.Edit("reduce.cuh", "0xffffffffu", "0x0000ffffu")
FAULTS = {
    "missing_barrier": Fault(
        "softmax", NO_BARRIER, (ptxsim.RaceHazard, ptxsim.UninitialisedRead), (3, 1024)
    ),
    "row_bound_off_by_one": Fault(
        "swiglu",
        nvcc.Edit(
            "swiglu.cu",
            "if (row >= op.rows) return;\n  const T* gate = static_cast<const T*>(op.gate) + row *"
            " op.gate_stride;\n  const T* up = static_cast<const T*>(op.up) + row * op.up_stride;\n"
            "  T* y",
            "if (row > op.rows) return;\n  const T* gate = static_cast<const T*>(op.gate) + row *"
            " op.gate_stride;\n  const T* up = static_cast<const T*>(op.up) + row * op.up_stride;\n"
            "  T* y",
        ),
        ptxsim.OutOfBounds,
        (3, 64),
    ),
    "shuffle_mask": Fault("softmax", HALF_A_WARP, ptxsim.WarpMaskError, (3, 64)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_cuda_kernels_planted_fault(name: str, record_property) -> None:
    """The simulator stops at each, in a kernel whose source was edited before it was compiled."""
    fault = FAULTS[name]
    op = REGISTRY[fault.op]
    count = 2 if fault.op == "swiglu" else 1
    inputs = [Draw(0).normal(*fault.shape) for _ in range(count)]
    broken = Library([fault.op], [fault.edit])
    with (
        simulated_ops.installed(broken, fault.op),
        dispatch.use("cuda"),
        pytest.raises(fault.caught) as caught,
    ):
        op.function(*inputs)
    record_property("fault_caught", f"{fault.op}/{name}/{type(caught.value).__name__}")
