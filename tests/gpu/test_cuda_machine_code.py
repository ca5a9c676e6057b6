"""What the CUDA kernels' machine code and memory accesses must be like: static facts, no time."""

from __future__ import annotations

from functools import cache

import inspect_kernels
import machine_code
import nvcc
import pytest
from machine_code import Block, Issue, count

MISSING = nvcc.why_not() or machine_code.why_not()
needs_tools = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TILES = {  # queries and keys of a block's turn, products of the tile, warps
    "attention_forward D=64": (128, 64, 64, 2),
    "attention_forward D=128": (128, 32, 128, 2),
    "attention_backward D=64": (64, 128, 64, 5),
    "attention_backward D=128": (64, 128, 128, 5),
    "attention_backward D=128 small": (32, 64, 128, 5),
}
"""The backward pass has 5/2 of the forward pass's products."""
PRODUCTS = {"attention_forward_sm90 D=64": (128, 64), "attention_forward_sm90 D=128": (128, 128)}
"""Keys of a block's turn and width: products of a warpgroup's 64 rows, 16 deep."""

EXPONENTIAL_BOUND = {"attention_forward_sm90 D=64"}
"""A score takes 4 D operations and one exponential, and an H100 does 256 operations in that time:
both units are busy throughout, the exponentials for the rows' new maxima tip the scales."""

SHARED_BOUND = {"attention_backward D=128 small"}
"""16 keys a warp: each ldmatrix feeds 2 products, and shared memory is busy for longer. For GPUs
whose blocks may have less than 164 KB of shared memory."""


SPILLED = {
    ("attention_backward D=64", 90): (32, 4),
    ("attention_backward D=64", 100): (16, 0),
}
"""Bytes of a thread, and accesses in a turn of the loop, at most: addresses for which dk, dv and
scores leave no register. No other kernel spills for any target."""


FLASH_ATTENTION_2 = {"local": 220, "occupancy": 8}
"""Of its forward pass, causal, at widths 64 and 128, as nvcc compiles it for sm_80: bytes that a
thread spills, at least (at most 290), and a multiprocessor's warps, which 255 registers allow."""
FEWER_WARPS = {("attention_decode D=128", 80): 4}
"""Decoding waits for memory, not for a warp's turn: a block has 100 KB of keys and values under way
or in use, of an A100's 164 KB."""


@cache
def facts(name: str, target: int) -> tuple[inspect_kernels.Facts, ...]:
    return tuple(inspect_kernels.facts(name, [target]))


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_cuda_machine_code_attention(target: int) -> None:
    """Tensor instructions as counted by hand, what bounds the loop, full width, no conflicts."""
    found = {fact.name: fact for fact in facts("attention", target)}
    assert TILES.keys() <= found.keys()
    for name, (m, n, width, products) in TILES.items():
        fact, opcodes = found[name], found[name].loop.opcodes
        warps = fact.traffic.threads // 32
        assert count(opcodes, "HMMA") == products * m * n * width // 2048 // warps, name
        bound = Issue.of(fact.loop.always).bound()
        assert bound == ("shared" if name in SHARED_BOUND else "tensor"), name
        spilled, touched = SPILLED.get((name, target), (0, 0))
        assert fact.resources.local <= spilled, name
        assert count(fact.loop.always, "LDL", "STL") <= touched, name
    for name, (n, width) in PRODUCTS.items() if target == 90 else ():
        fact = found[name]
        assert count(fact.loop.opcodes, "HGMMA") == width // 16 + n // 16, name
        bound = Issue.of(fact.loop.always).bound()
        assert bound == ("exponential" if name in EXPONENTIAL_BOUND else "tensor"), name
        assert fact.resources.local == 0 and fact.occupancy == 12, name
    for name, fact in found.items():
        assert fact.traffic.conflicts == 0, name
        assert fact.traffic.coalescing == 1.0, name
        # lse and delta, and the parts that are combined, are single floats; one thread of a block
        # of keys looks whose turn it is to add to dq, another one says that this block's is over.
        narrow = machine_code.narrow_accesses(fact.loop.opcodes)
        if not name.startswith(("attention_combine", "attention_backward_rows")):
            assert narrow == (2 if name.startswith("attention_backward") else 0), name
        assert not count(fact.loop.opcodes, "ATOM", "ATOMG", "RED"), name


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_cuda_machine_code_attention_beside_flash_attention_2(target: int) -> None:
    """A thread spills less, a multiprocessor has as many warps; and no more registers, of which
    there are 255."""
    compared = [
        f for f in facts("attention", target) if count(f.loop.opcodes, *machine_code.TENSOR)
    ]
    assert {*TILES, "attention_decode D=64", "attention_decode D=128"} <= {f.name for f in compared}
    for fact in compared:
        assert fact.resources.registers <= 255, fact.name
        assert fact.resources.local < FLASH_ATTENTION_2["local"], fact.name
        least = FEWER_WARPS.get((fact.name, target), FLASH_ATTENTION_2["occupancy"])
        assert fact.occupancy >= least, fact.name


ROW_WISE = [name for name in inspect_kernels.simulated_ops.BINDINGS if name != "attention"]
SMALL = ("sum_partials", "cross_entropy_sum", "count_targets")
"""Kernels over a vector of floats or targets, beside the ones that move the tensors."""


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("name", ROW_WISE)
def test_cuda_machine_code_row_wise(name: str, target: int) -> None:
    """128 bits an access, no local memory, no conflicts, a quarter of the warps at least."""
    for fact in facts(name, target):
        assert fact.resources.local == 0, fact.name
        assert fact.traffic.conflicts == 0, fact.name
        assert fact.occupancy >= 16, fact.name
        if fact.name not in SMALL:
            assert machine_code.narrow_accesses(fact.loop.opcodes) == 0, fact.name
            # Sums of gradients are float32 beside 16-bit rows: two accesses to each of a thread's.
            assert fact.traffic.coalescing >= (0.65 if fact.name == "norm_backward" else 1.0)


def test_machine_code_finds_the_hot_loop() -> None:
    """An outer loop, a conditional block inside of the inner one, unreachable code behind."""
    code = [
        Block("", ["MOV"], [None]),
        Block("outer", ["LDG.E"], [None]),
        Block("inner", ["HMMA.16816.F32", "ISETP"], ["after", None]),
        Block("", ["FSEL"], [None]),
        Block("after", ["HMMA.16816.F32"], ["inner", None]),
        Block("", ["STG.E.128"], ["outer", None]),
        Block("", ["EXIT"], []),
        Block("", ["BRA"], ["inner"]),
    ]
    loops = machine_code.loops(code)
    assert sorted(sum(loop.opcodes.values()) for loop in loops) == [4, 6]
    inner = min(loops, key=lambda loop: sum(loop.opcodes.values()))
    assert count(inner.always, "HMMA") == 2 and count(inner.always, "FSEL") == 0
    assert count(inner.opcodes, "FSEL") == 1
    hot = machine_code.hot_loop(code)
    assert count(hot.opcodes, "HMMA") == 2


def test_machine_code_occupancy() -> None:
    assert machine_code.occupancy(255, 64 * 1024, 128, machine_code.A100) == 8
    assert machine_code.occupancy(32, 0, 1024, machine_code.A100) == 64
    assert machine_code.occupancy(255, 64 * 1024, 128, machine_code.H100) == 8
