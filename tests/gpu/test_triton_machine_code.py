"""What the Triton kernels' machine code and memory accesses must be like: static facts, no time."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import amd_code
import machine_code
import pytest

from llmcore.dispatch import REGISTRY

MISSING = (
    "" if importlib.util.find_spec("triton") else "the package triton is not installed"
) or machine_code.why_not()
needs_tools = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = ("attention", "attention_varlen", "paged_attention", "linear", "linear_cross_entropy")
ROW_WISE = tuple(
    name for name, op in REGISTRY.items() if op.candidate("triton") and name not in PRODUCTS
)


@functools.cache
def printed(names: tuple[str, ...], target: str) -> tuple[dict[str, Any], ...]:
    """What inspect_triton.py prints of these ops' kernels, which one process compiles."""
    script = Path(__file__).with_name("inspect_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), *names, "--json", "--targets", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(map(json.loads, run.stdout.splitlines()))


def facts(name: str, target: str, beside: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Of an op's kernels, inspected together with those `beside` it."""
    return [fact for fact in printed(beside or (name,), target) if fact["op"] == name]


def test_amd_code_reads_registers_and_the_hot_loop() -> None:
    code = amd_code.read(
        """
kernel:
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_ushort v5, v4, s[0:1]
.LBB0_2:
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tscratch_load_dword v6, off, off
\ts_cbranch_scc1 .LBB0_2
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
\t.section\t.rodata
    .private_segment_fixed_size: 12
    .vgpr_count:     100
"""
    )
    assert (code.vector_registers, code.local) == (100, 12)
    assert sum(code.loop.values()) == 6  # as many products in both loops: the one with the loads
    assert amd_code.multiply_adds(code.loop, 4) == 4 * 32 * 32 * 8
    assert amd_code.count(code.loop, "scratch_") == 1
    assert amd_code.bytes_moved(code.loop) == 18 and amd_code.narrow_accesses(code.loop) == 1
    assert amd_code.occupancy(code, 20000, 4) == 12  # 16 by registers, 3 blocks by shared memory


def test_machine_code_multiply_adds() -> None:
    warp = Counter({"HMMA.16816.F32.BF16": 2, "HMMA.1688.F32.TF32": 1, "IMMA.16832.S8.S8": 1})
    assert machine_code.multiply_adds(warp, 4) == 4 * 16 * 8 * (2 * 16 + 8 + 32)
    group = Counter({"HGMMA.64x128x16.F32.BF16": 3, "LDS.128": 1})
    assert machine_code.multiply_adds(group, 8) == 2 * 3 * 64 * 128 * 16


LOW_BOUND = ("attention.combine_kernel", "attention_backward.delta_kernel")
"""Few bytes, beside kernels that move or multiply far more."""


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_triton_machine_code_products(name: str, target: str) -> None:
    """Products as counted by hand, nothing spilled in the loop (little where it has masked blocks),
    full width, no atomics."""
    found = facts(name, target, PRODUCTS)
    assert found
    for fact in found:
        kernel, title = fact["kernel"].split()[0], (fact["kernel"], target)
        assert fact["local_in_loop"] <= spilled_by_design(name, target, kernel), title
        assert fact["local_in_masked"] <= (16 if target == "sm_80" else 0), title
        assert fact["atomics"] == 0, title
        if not fact["macs_by_hand"] or kernel in LOW_BOUND:
            continue
        # A tile of 16 rows is less than what one wave of AMD's multiplies at once.
        if not (target == "gfx942" and " M=16" in fact["kernel"]):
            assert fact["macs"] == fact["macs_by_hand"], title
        assert fact["occupancy"] >= (4 if target == "gfx942" else 8), title
        if target != "gfx942":
            assert fact["narrow"] <= narrow_by_design(kernel, name), title
        if target == "sm_80":
            # lse and delta, and the last of the columns of a part, are single floats.
            assert fact["coalescing"] >= 0.95, title


def narrow_by_design(kernel: str, name: str) -> int:
    """Loads of less than 128 bits in the loop: a row's lse and delta, a group's scales and sums, a
    key's page."""
    if name == "paged_attention":
        return 9
    return {"attention_backward.key_kernel": 2, "linear.product_kernel": 4}.get(kernel, 0)


def spilled_by_design(name: str, target: str, kernel: str) -> int:
    """A packed sequence's place takes a register or two that mma.sync's largest tile has not."""
    packed = name == "attention_varlen" and kernel == "attention.forward_kernel"
    return 2 if packed and target == "sm_80" else 0


TENSOR_SHARE = {
    "attention": {
        "attention.forward_kernel D=64 M=128": 1.0,
        "attention.forward_kernel D=128 M=128": 1.0,
        "attention_backward.key_kernel D=64 M=32": 1.0,
        "attention_backward.key_kernel D=128 M=64": 0.92,
        "attention_backward.query_kernel D=64 M=128": 0.84,
        "attention_backward.query_kernel D=128 M=128": 0.84,
    },
    "attention_varlen": {
        "attention.forward_kernel D=64 M=128": 1.0,
        "attention.forward_kernel D=128 M=128": 1.0,
        "attention_backward.key_kernel D=64 M=32": 0.71,
        "attention_backward.key_kernel D=128 M=32": 0.62,
        "attention_backward.query_kernel D=64 M=128": 0.84,
        "attention_backward.query_kernel D=128 M=128": 0.84,
    },
    "linear_cross_entropy": {
        "linear_cross_entropy.forward_kernel M=128": 1.0,
        "linear_cross_entropy.gradient_kernel M=128": 1.0,
    },
}
"""In a scheduler's issue model of sm_80: for how much of the busiest unit's time tensor cores are
busy. What is below 1 waits for shared memory; inspect_triton.py has the reasons."""


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", TENSOR_SHARE)
def test_triton_machine_code_tensor_cores_are_busy(name: str) -> None:
    found = {fact["kernel"]: fact["tensor_share"] for fact in facts(name, "sm_80", PRODUCTS)}
    for kernel, least in TENSOR_SHARE[name].items():
        assert found[kernel] >= least, (kernel, found[kernel])


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "paged_attention", "linear"])
def test_triton_machine_code_decoding_waits_for_memory(name: str) -> None:
    """What reads each byte once has nothing else that takes longer than that."""
    decoding = [
        f for f in facts(name, "sm_80", PRODUCTS) if "split" in f["kernel"] or "int8" in f["kernel"]
    ]
    assert decoding and all(fact["bound"] == "memory" for fact in decoding), decoding


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ROW_WISE)
def test_triton_machine_code_row_wise(name: str, target: str) -> None:
    hold_row_wise(facts(name, target, ROW_WISE), target)


@needs_tools
def test_triton_machine_code_softmax() -> None:
    hold_row_wise(facts("softmax", "sm_80"), "sm_80")


def hold_row_wise(found: list[dict[str, Any]], target: str) -> None:
    """128 bits an access, nothing spilled, no conflicts, a quarter of the warps at least."""
    assert found
    for fact in found:
        title = fact["kernel"], target
        assert fact["local"] == 0 and fact["atomics"] == 0, title
        assert fact["occupancy"] >= 16, title
        if target != "gfx942":  # whose compiler takes 64 bits where a block is small
            # cross_entropy's backward reads four numbers of its row, the same for all threads.
            numbers = 4 if fact["kernel"] == "cross_entropy.backward_kernel" else 0
            assert fact["narrow"] == numbers, title
        if target == "sm_80":
            assert fact["conflicts"] == 0 and fact["coalescing"] == 1.0, title
