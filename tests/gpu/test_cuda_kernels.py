"""Every CUDA kernel, its PTX executed instruction by instruction, against its op's definition.

The launchers' host code runs too. A test fails for an access outside of a tensor, an uninitialised
read, a race between barriers or a misaligned address as well as for a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import nvcc
import ptxsim
import pytest
import simulated_ops
import torch
from simulated import Library, executed, plain_name

from llmcore import dispatch
from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import BACKWARD_FACTOR, FORWARD_FACTOR, judge, verify_backend

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())


OFTEN = ("add_layer_norm", "softmax", "cross_entropy", "rope", "swiglu", "attention")
"""Ops of the default run: the other norms are the same body with less in it, and take nvcc as long
as all of the others that go by rows."""


@cache
def library(often: bool) -> Library:
    """The launchers of the ops of the default run, or of the others: compiled together."""
    names = [name for name in simulated_ops.BINDINGS if (name in OFTEN) == often]
    return Library(sum(map(simulated_ops.sources_of, names), ()))


def options(**given: Any) -> dict[str, Any]:
    return {"return_lse": True, **given}


# B, H, G, T, S, D and options: the contract's samples have few of these widths.
ATTENTION = {
    "one_block": ((1, 1, 1, 20, 20, 64), options()),
    "causal_64": ((1, 2, 1, 130, 150, 64), options(causal=True)),
    "causal_128": ((1, 2, 1, 70, 150, 128), options(causal=True)),
    "softcap_window": ((1, 2, 2, 33, 65, 64), options(softcap=5.0, window=(9, 3))),
    "window_128": ((1, 1, 1, 130, 160, 128), options(window=(30, None), causal=True)),
    "more_queries_than_keys": ((1, 1, 1, 40, 9, 64), options(causal=True)),
    "lengths": ((2, 2, 2, 40, 90, 64), options(causal=True, kv_lengths=torch.tensor([0, 70]))),
    "offsets": ((2, 2, 2, 40, 90, 64), options(causal=True, q_offset=torch.tensor([3, -70]))),
    "long": ((1, 1, 1, 30, 400, 64), options(kv_lengths=torch.tensor([390]))),
    "decode": ((2, 6, 2, 1, 70, 64), options()),
    "decode_split": ((1, 8, 2, 2, 1100, 128), options(causal=True, softcap=9.0)),
}


def attention_samples() -> list[Sample]:
    draw = Draw(1)
    found = []
    for name, ((b, h, g, t, s, d), given) in ATTENTION.items():
        tensors = draw.normal(b, h, t, d), draw.normal(b, g, s, d), draw.normal(b, g, s, d)
        found.append(Sample(name, tensors, given))
    return found


SLOW = pytest.mark.slow
QUICK_SM90 = ("long",)
QUICK = ("one_block", "causal_128", "softcap_window", "lengths", "decode")


def test_cuda_kernels_attention(record_property) -> None:
    samples = [sample for sample in attention_samples() if sample.name in QUICK]
    hold("attention", "bfloat16", samples, record_property)


@SLOW
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_kernels_attention_every_option(dtype: str, record_property) -> None:
    hold("attention", dtype, attention_samples(), record_property)


@cache
def library_sm90() -> Library:
    return simulated_ops.library_of("attention", capability=90)


def hold_sm90(dtype: str, samples: list[Sample], record_property: Any) -> None:
    before = len(library_sm90().stats)
    hold("attention", dtype, samples, record_property, library_sm90())
    assert "attention_forward_sm90_kernel" in kernels_since(before)


def kernels_since(before: int) -> set[str]:
    return {plain_name(kernel) for kernel, _ in library_sm90().stats[before:]}


def test_cuda_kernels_attention_sm90(record_property) -> None:
    """Where the GPU's compute capability is 9.0 another kernel does the forward pass."""
    samples = [sample for sample in attention_samples() if sample.name in QUICK_SM90]
    hold_sm90("bfloat16", samples, record_property)


@SLOW
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_kernels_attention_sm90_every_option(dtype: str, record_property) -> None:
    hold_sm90(dtype, attention_samples(), record_property)


@SLOW
def test_cuda_kernels_attention_little_shared_memory(record_property) -> None:
    """Where a block may have 99 KB only, another kernel does the keys' gradients at width 128."""
    samples = [sample for sample in attention_samples() if sample.name == "causal_128"]
    launchers = simulated_ops.library_of("attention", capability=89)
    hold("attention", "bfloat16", samples, record_property, launchers)
    assert any(
        "backward_kernelI13__nv_bfloat16Li128ELb1E" in kernel for kernel in launchers.geometry
    )


@SLOW
@pytest.mark.parametrize("width", [64, 128])
def test_cuda_kernels_attention_gradients_same_bits(width: int) -> None:
    """Blocks of keys add to dq in turn: one after the other, or all at the same time."""
    draw = Draw(3)
    shapes = ((1, 4, 150, width), (1, 2, 600, width), (1, 2, 600, width))
    args = [draw.normal(*shape).bfloat16().requires_grad_() for shape in shapes]
    found = []
    for lanes in (256, 1 << 15):
        launchers = simulated_ops.library_of("attention")
        launchers.options = {"lanes_per_chunk": lanes}
        with simulated_ops.installed(launchers, "attention"), dispatch.use("cuda"):
            out = REGISTRY["attention"].function(*args, causal=True)
        found.append(torch.autograd.grad(out, args, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@SLOW
def test_cuda_kernels_attention_sm90_only_where_it_fits() -> None:
    """A tensor map knows no stride of 0: keys that heads share by one go to the other kernel."""
    draw = Draw(2)
    q, k = draw.normal(1, 2, 20, 64).bfloat16(), draw.normal(1, 1, 40, 64).bfloat16()
    before = len(library_sm90().stats)
    with simulated_ops.installed(library_sm90(), "attention"), dispatch.use("cuda"):
        REGISTRY["attention"].function(q, k.expand(1, 2, 40, 64), k.expand(1, 2, 40, 64))
    assert kernels_since(before) == {"attention_forward_kernel"}


ROW_WISE = [name for name in simulated_ops.BINDINGS if name != "attention"]
DTYPES = ("bfloat16", "float32", "float16")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, d, marks=() if n in OFTEN and d == "bfloat16" else SLOW)
        for n in ROW_WISE
        for d in DTYPES
    ],
)
def test_cuda_kernels_samples(name: str, dtype: str, record_property) -> None:
    """The contract's own samples: results and gradients within the yardstick."""
    hold(name, dtype, list(REGISTRY[name].samples(Draw(0))), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_cuda_kernels_attention_sweep(dtype: str, seed: int, record_property) -> None:
    """The contract's samples of attention, of which most have another width and are refused."""
    hold("attention", dtype, list(REGISTRY["attention"].samples(Draw(seed))), record_property)


def hold(
    name: str,
    dtype: str,
    samples: list[Sample],
    record_property: Any,
    launchers: Library | None = None,
) -> None:
    """Results and gradients of the op's CUDA kernels within the yardstick, on all these."""
    op = REGISTRY[name]
    executed.take()
    with simulated_ops.installed(launchers or library(name in OFTEN), name):
        line = verify_backend(op, "cuda", getattr(torch, dtype), samples)
    record_property("simulated", executed.take())
    assert not line.failures and not line.skipped, str(line)


@dataclass(frozen=True)
class Fault:
    """An edit of an op's source, what it must be caught as (None: as wrong numbers), and the inputs
    that show it."""

    op: str
    file: str
    old: str
    new: str
    caught: tuple[type[ptxsim.KernelFault], ...] | None
    shapes: tuple[tuple[int, ...], ...]
    kv_length: int | None = None

    @property
    def backward(self) -> bool:
        return self.file == "attention_backward.cu"

    @property
    def capability(self) -> int:
        return 90 if self.file in ("attention_sm90.cu", "warpgroup.cuh") else 80


ROWS = ((3, 64), (3, 64))
HEADS = ((1, 1, 140, 64),) * 3
MANY_KEYS = ((1, 1, 40, 64), (1, 1, 500, 64), (1, 1, 500, 64))
HAZARDS = (ptxsim.AsyncCopyHazard, ptxsim.RaceHazard, ptxsim.UninitialisedRead)
LOOP_BARRIER = (
    "__syncthreads();  // this block's keys are there, and no warp reads the last one's any more"
)
LAST_WAIT = "    wait_products<0>();\n    hold(out[0]);\n  }\n"
VALUES_USED = """      wait_products<0>();
      hold(out[0]);
      release(at.v_empty(stage_of(block - 1)));
"""
GIVEN_BACK_EARLY = """      release(at.v_empty(stage_of(block - 1)));
      wait_products<0>();
      hold(out[0]);
"""
FAULTS = {
    "missing_barrier": Fault(
        *("softmax", "reduce.cuh", "  __syncthreads();\n", ""),
        (ptxsim.RaceHazard, ptxsim.UninitialisedRead),
        ((3, 1024),),
    ),
    "row_bound_off_by_one": Fault(
        *("swiglu", "swiglu.cu", "row >= op.rows) return;  // f", "row > op.rows) return;  // f"),
        (ptxsim.OutOfBounds,),
        ROWS,
    ),
    "half_a_warp": Fault(
        *("softmax", "reduce.cuh", "0xffffffffu", "0x0000ffffu"), (ptxsim.WarpMaskError,), ROWS[:1]
    ),
    "missing_loop_barrier": Fault(
        *("attention", "attention.cu", LOOP_BARRIER, "//"),
        (ptxsim.RaceHazard, ptxsim.AsyncCopyHazard, ptxsim.UninitialisedRead),
        HEADS,
    ),
    "copy_not_waited_for": Fault(
        *("attention", "attention.cu", f"wait_copies<0>();\n    {LOOP_BARRIER}", LOOP_BARRIER),
        (ptxsim.AsyncCopyHazard, ptxsim.UninitialisedRead),
        ((1, 1, 140, 128),) * 3,
    ),
    "mask_off_by_one": Fault(
        *("attention", "attention.cuh", "ahead <= right &&", "ahead <= right + 1 &&"), None, HEADS
    ),
    "keys_not_waited_for": Fault(
        *("attention", "attention_sm90.cu"),
        *("    wait(at.k_full(stage_of(block)), parity_of(block));\n", "", HAZARDS, MANY_KEYS),
    ),
    "stage_not_empty": Fault(
        *("attention", "attention_sm90.cu"),
        *("    wait(at.v_empty(stage), emptied);\n", "", (*HAZARDS, ptxsim.BarrierError)),
        MANY_KEYS,
    ),
    "stage_given_back_early": Fault(
        *("attention", "attention_sm90.cu", VALUES_USED, GIVEN_BACK_EARLY),
        *(HAZARDS, MANY_KEYS),
    ),
    "zeros_not_fenced": Fault(
        *(
            "attention",
            "attention_sm90.cu",
            "    fence_async();\n    __syncwarp();",
            "__syncwarp();",
        ),
        *(HAZARDS[:1], MANY_KEYS, 450),
    ),
    "barriers_not_fenced": Fault(
        *("attention", "attention_sm90.cu", "    }\n    fence_async();\n  }", "    }\n  }"),
        *(HAZARDS[:1], MANY_KEYS),
    ),
    "product_not_waited_for": Fault(
        *("attention", "attention_sm90.cu", LAST_WAIT, "  }\n", HAZARDS, MANY_KEYS),
    ),
    "registers_not_fenced": Fault(
        *("attention", "attention_sm90.cu", "    hold(s[0]);\n    fence_products();\n"),
        *("", HAZARDS[:1], MANY_KEYS),
    ),
    "too_few_bytes_expected": Fault(
        *("attention", "attention_sm90.cu", "Shape::PANELS * panel_bytes);", "panel_bytes / 2);"),
        *((*HAZARDS, ptxsim.BarrierError), MANY_KEYS),
    ),
    "wrong_swizzle": Fault(
        *(
            "attention",
            "warpgroup.cuh",
            "uint64_t(1) << 62",
            "uint64_t(2) << 62",
            HAZARDS,
            MANY_KEYS,
        ),
    ),
}

THREE_BLOCKS = ((1, 1, 140, 64), (1, 1, 300, 64), (1, 1, 300, 64))
TURN = "< unsigned(block - parts.first(BLOCK_K))) {\n      }"
LOOK = f"      while (load_acquire(whole.arrivals + tile_at(head, query)) {TURN}\n"
BEFORE = """thread == 0 && (head > 0 || query > first_query)) {
      hand_on(query == first_query ? head - 1 : head, \
query == first_query ? last_query : query - BLOCK_Q)"""
GRADIENTS = "__syncthreads();  // all gradients"
BY_ONE = f"thread == 32 && adds) {{\n{LOOK}    }}\n    {GRADIENTS}"
BY_ALL = f"adds) {{\n{LOOK}    }}\n    // all gradients"
BACKWARD_FAULTS = {
    "turn_not_waited_for": (LOOK, "", HAZARDS),
    "turn_looked_at_once": (LOOK, LOOK.replace("while", "if"), HAZARDS),
    "turn_of_another": (TURN, TURN.replace("block - parts.first(BLOCK_K)", "1"), HAZARDS),
    "turn_that_never_comes": (TURN, TURN.replace("<", "<=", 1), (ptxsim.BarrierError,)),
    "part_not_released": ("st.release.gpu", "st.relaxed.gpu", HAZARDS),
    "part_released_to_this_block": ("st.release.gpu", "st.release.cta", HAZARDS),
    "part_not_acquired": ("ld.acquire.gpu", "ld.relaxed.gpu", HAZARDS),
    "part_released_early": (BEFORE, "thread == 0) {\n      hand_on(head, query)", HAZARDS),
    "gradients_not_waited_for": (BY_ONE, BY_ALL, HAZARDS),
    "warp_that_waits_left_behind": (GRADIENTS, "// all gradients", (ptxsim.WarpMaskError,)),
    "first_part_added_to": ("adds = parts.low < first_key", "adds = true", None),
    "last_part_dropped": ("leaves = parts.end > first_key + BLOCK_K;", "leaves = true;", None),
}
"""Of attention_backward.cu."""
FAULTS |= {
    name: Fault("attention", "attention_backward.cu", old, new, caught, THREE_BLOCKS)
    for name, (old, new, caught) in BACKWARD_FAULTS.items()
}

QUICK_FAULTS = ("missing_barrier", "row_bound_off_by_one")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK_FAULTS else SLOW) for n in FAULTS],
)
def test_cuda_kernels_planted_fault(name: str, record_property) -> None:
    """Each is found, in a kernel whose source was edited before it was compiled."""
    fault = FAULTS[name]
    op = REGISTRY[fault.op]
    draw = Draw(0)
    given: dict[str, Any] = {"causal": True} if fault.op == "attention" else {}
    if fault.kv_length is not None:
        given["kv_lengths"] = torch.tensor([fault.kv_length])
    sample = Sample(name, tuple(draw.normal(*shape) for shape in fault.shapes), given)
    dtype = torch.bfloat16
    sources = simulated_ops.sources_of(fault.op)
    sources = tuple(s for s in sources if fault.backward or "backward" not in s)
    edit = nvcc.Edit(fault.file, fault.old, fault.new)
    broken = Library(sources, [edit], fault.capability)
    args, keywords = sample.cast(dtype, "cpu")

    def run(function: Any, of: list[torch.Tensor]) -> torch.Tensor:
        """The first argument's gradient, where the fault is in the backward pass."""
        if not fault.backward:
            return function(*of, **keywords)
        of = [a.detach().requires_grad_() for a in of]
        result = function(*of, **keywords)
        return torch.autograd.grad((result * result.detach()).sum(), of)[0]

    with simulated_ops.installed(broken, fault.op), dispatch.use("cuda"):
        if fault.caught is None:
            gold = run(op.define, [a.double() for a in args])
            factor = BACKWARD_FACTOR if fault.backward else FORWARD_FACTOR
            verdict = judge(run(op.function, args), gold, run(op.define, args), factor)
            assert not verdict.passed
            how = "wrong numbers"
        else:
            with pytest.raises(fault.caught) as caught:
                run(op.function, args)
            how = type(caught.value).__name__
    record_property("fault_caught", (broken.last, f"{name} ({how})"))
