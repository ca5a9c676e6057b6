"""Static facts of every CUDA and Triton kernel, and what the simulator counts of its accesses.

    python tests/gpu/inspect_kernels.py [op ...] [--kernels cuda triton] [--targets 80 gfx942 ...]

No GPU is involved, and no time is measured: static facts can refute a kernel, never prove its
speed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inspected_calls
import machine_code
import nvcc
import simulated
import simulated_ops
from machine_code import A100, H100, Issue, count

from llmcore import dispatch
from llmcore.dispatch import REGISTRY

BF16 = torch.bfloat16


@dataclass
class Traffic:
    """What the simulator counted of one kernel's accesses, over all its launches."""

    threads: int
    dynamic_shared: int
    conflicts: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    instructions: int = 0

    @property
    def coalescing(self) -> float:
        return self.ideal_sectors / max(self.sectors, 1)


@functools.cache
def traffic(name: str) -> dict[str, Traffic]:
    """By mangled name, each kernel of the op that a bfloat16 call and its gradient launch.

    Whatever GPU is asked about: counted once for all of them.
    """
    found: dict[str, Traffic] = {}
    for capability in capabilities(name):
        # A kernel that both run is counted once.
        found = count_traffic(name, capability) | found
    return found


def capabilities(name: str) -> list[int]:
    """Of the GPUs that have kernels of their own for this op, 80 first."""
    own = [nvcc.own_target(source) for source in simulated_ops.sources_of(name)]
    small = [89] if name == "attention" else []  # of little shared memory
    return [80, *small, *sorted({int(target.rstrip("a")) for target in own if target})]


def count_traffic(name: str, capability: int) -> dict[str, Traffic]:
    op, library = REGISTRY[name], simulated_ops.library_of(name, capability=capability)
    library.options = {"statistics": True}
    for sample in inspected_calls.samples(name):
        args, options = sample.cast(BF16, "cpu")
        floating = [
            a.requires_grad_() for a in args if torch.is_tensor(a) and a.is_floating_point()
        ]
        if name == "rope":
            floating = floating[:1]
            args[1:] = [a.detach() for a in args[1:]]
        with simulated_ops.installed(library, name), dispatch.use("cuda"):
            result = op.function(*args, **options)
            outputs = result if isinstance(result, tuple) else (result,)
            if inspected_calls.has_gradient(name, sample):
                torch.autograd.grad([o.sum() for o in outputs], floating)
    found: dict[str, Traffic] = {}
    for kernel, stats in library.stats:
        threads, shared = library.geometry[kernel]
        entry = found.setdefault(kernel, Traffic(threads, shared))
        entry.conflicts += stats.bank_conflicts
        entry.instructions += stats.instructions
        for access in stats.memory.values():
            if access.space == "global":
                entry.sectors += access.units
                entry.ideal_sectors += access.ideal
    return found


@dataclass(frozen=True)
class Facts:
    """A kernel's machine code for one target, and its traffic."""

    kernel: str
    target: int
    resources: machine_code.Resources
    loop: machine_code.Loop
    traffic: Traffic

    @property
    def name(self) -> str:
        width = " D=64" if "Li64E" in self.kernel else " D=128" if "Li128E" in self.kernel else ""
        if "attention_backward_kernel" in self.kernel and "Li128ELb1E" in self.kernel:
            width += " small"  # for GPUs with less shared memory
        return simulated.plain_name(self.kernel).removesuffix("_kernel") + width

    @property
    def shared(self) -> int:
        """Bytes that a block asks for; from sm_90 on the tools count the reserved ones too."""
        reserved = machine_code.RESERVED if self.target >= 90 else 0
        return max(self.resources.shared - reserved, 0) + self.traffic.dynamic_shared

    @property
    def occupancy(self) -> int:
        machine = A100 if self.target < 90 else H100
        return machine_code.occupancy(
            self.resources.registers, self.shared, self.traffic.threads, machine
        )

    def __str__(self) -> str:
        ops = self.loop.opcodes
        total = sum(ops.values())
        tensor = count(ops, *machine_code.TENSOR)
        always = Issue.of(self.loop.always)
        bound = f", bound by {always.bound()}" if tensor else ""
        return (
            f"{self.name:<38} sm_{self.target:<4}{self.resources.registers:>4} registers"
            f"{self.resources.local:>4} local{self.shared:>7} shared  "
            f"{self.occupancy:>2}/64 warps  "
            f"loop {total:>4}: {tensor} tensor, {count(ops, 'LDSM')} ldmatrix, "
            f"{count(ops, 'LDG', 'STG', 'LDGSTS')} global "
            f"({machine_code.narrow_accesses(ops)} below 128 bits), "
            f"{count(ops, 'LDL', 'STL')} local{bound}; "
            f"{self.traffic.conflicts} bank conflicts, {self.traffic.coalescing:.0%} coalesced"
        )

    def shortcomings(self) -> Iterator[str]:
        """What a fast kernel would not have, with the reason where there is one."""
        ops, plain = self.loop.opcodes, simulated.plain_name(self.kernel)
        bound = Issue.of(self.loop.always).bound()
        found = {
            "local": count(ops, "LDL", "STL"),
            "atomic": count(ops, "ATOM", "ATOMG", "RED"),
            "bound": count(ops, *machine_code.TENSOR) > 0 and bound != "tensor",
            "narrow": machine_code.narrow_accesses(ops),
            "conflicts": self.traffic.conflicts,
            "coalescing": self.traffic.coalescing < 1.0,
        }
        texts = {
            "local": f"{found['local']} accesses of local memory in the loop",
            "atomic": f"{found['atomic']} atomics in the loop",
            "bound": f"the tensor cores wait for: {bound}",
            "narrow": f"{found['narrow']} global accesses of less than 128 bits",
            "conflicts": f"{found['conflicts']} bank conflicts",
            "coalescing": f"{self.traffic.coalescing:.0%} coalesced",
        }
        for what, holds in found.items():
            if holds:
                reason = REASONS.get((what, self.name)) or REASONS.get((what, plain), "no reason")
                yield f"{texts[what]} ({reason})"


ROW_VALUES = "single floats of rows, beside the tensors"
REASONS = {
    ("bound", "attention_decode_kernel"): "it is bound by memory: K and V are read once",
    (
        "bound",
        "attention_forward_sm90 D=64",
    ): "one exponential for 4 D operations, as H100 has them",
    ("bound", "attention_backward D=128 small"): "for GPUs of little shared memory: 16 keys "
    "a warp, so that an ldmatrix feeds 2 products",
    ("local", "attention_backward D=64"): "sm_90: addresses for which dk, dv and scores leave no "
    "register, 4 of them in a turn without masks",
    (
        "narrow",
        "attention_backward_kernel",
    ): "one thread's look at whose turn it is, and its answer",
    ("narrow", "attention_backward_rows_kernel"): ROW_VALUES,
    ("narrow", "attention_combine_kernel"): "float32 parts of few rows",
    ("narrow", "sum_partials_kernel"): "one sum for each column, over rows of float32",
    ("narrow", "cross_entropy_sum_kernel"): ROW_VALUES,
    ("narrow", "count_targets_kernel"): ROW_VALUES,
    ("coalescing", "norm_backward_kernel"): "float32 sums beside 16-bit rows: two accesses each",
}
"""By shortcoming, and kernel or kernel with its width."""


def facts(name: str, targets: list[int]) -> Iterator[Facts]:
    counted = traffic(name)
    for target in targets:
        for source in simulated_ops.sources_of(name):
            if nvcc.own_target(source) not in (None, f"{target}a"):
                continue
            cubin = nvcc.cubin(source, target)
            code, used = machine_code.functions(cubin), machine_code.resources(cubin)
            for kernel in counted:
                if kernel in code:
                    loop = machine_code.hot_loop(code[kernel])
                    yield Facts(kernel, target, used[kernel], loop, counted[kernel])


# Real shapes: what is moved and computed at least, in bytes and operations.
ROWS, WIDTH, CLASSES, LENGTH, HEADS, D = 8192, 4096, 128256, 4096, 32, 128
BOUNDS = {
    f"rms_norm, layer_norm {ROWS}x{WIDTH}": (4 * ROWS * WIDTH, 0),
    f"add_rms_norm, add_layer_norm {ROWS}x{WIDTH}": (8 * ROWS * WIDTH, 0),
    f"norms backward {ROWS}x{WIDTH}": (6 * ROWS * WIDTH, 0),
    f"softmax {ROWS}x{WIDTH}": (4 * ROWS * WIDTH, 0),
    f"swiglu, geglu {ROWS}x{WIDTH}": (6 * ROWS * WIDTH, 0),
    f"gelu {ROWS}x{WIDTH}": (4 * ROWS * WIDTH, 0),
    f"cross_entropy 2048x{CLASSES}": (2 * 2048 * CLASSES, 0),
    f"attention causal 1x{HEADS}x{LENGTH}x{D}": (
        8 * HEADS * LENGTH * D,
        2 * HEADS * LENGTH * LENGTH * D,
    ),
    f"attention backward, causal, 1x{HEADS}x{LENGTH}x{D}": (
        16 * HEADS * LENGTH * D,
        5 * HEADS * LENGTH * LENGTH * D,
    ),
    f"the same, were all parts of dq moved by main memory, 1x{HEADS}x{LENGTH}x{D}": (
        # Each of 128 keys to a block reads and writes float32 of the queries that see them.
        16 * HEADS * LENGTH * D + HEADS * (LENGTH // 128) * (LENGTH // 2) * D * 8,
        5 * HEADS * LENGTH * LENGTH * D,
    ),
    f"attention decode 16x8x{LENGTH}x{D}": (16 * 8 * LENGTH * D * 4, 0),
    f"linear int8, 1 row, {WIDTH}x{WIDTH}": (WIDTH * WIDTH, 2 * WIDTH * WIDTH),
    f"linear int4, 1 row, {WIDTH}x{WIDTH}": (WIDTH * WIDTH // 2, 2 * WIDTH * WIDTH),
    f"linear_cross_entropy 2048x{WIDTH}x{CLASSES}": (
        2 * (2048 + CLASSES) * WIDTH,
        2 * 2048 * WIDTH * CLASSES,
    ),
}


def rooflines() -> Iterator[str]:
    for name, (size, operations) in BOUNDS.items():
        parts = []
        for machine in (A100, H100):
            memory, compute = size / machine.bandwidth, operations / machine.tensor
            kind = "memory" if memory >= compute else "tensor cores"
            parts.append(f"{machine.name} {max(memory, compute) * 1e6:.0f} us ({kind})")
        work = f"{size / 1e6:.0f} MB, {operations / 1e9:.0f} GFLOP"
        yield f"{name}: {work}; at least {', '.join(parts)}"


def print_cuda(ops: list[str], targets: list[str]) -> None:
    if why := nvcc.why_not() or machine_code.why_not():
        print(f"CUDA kernels: not inspected, {why}")
        return
    print("CUDA kernels")
    numbers = [int(target) for target in targets if target.isdigit()]
    for name in (op for op in simulated_ops.BINDINGS if op in ops):
        for line in facts(name, numbers):
            print(line, flush=True)
            for shortcoming in line.shortcomings():
                print(f"    does not hold: {shortcoming}", flush=True)


def print_triton(ops: list[str], targets: list[str]) -> None:
    if why := machine_code.why_not():
        print(f"Triton kernels: not inspected, {why}")
        return
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: compiled, not interpreted
    import inspect_triton

    print("Triton kernels")
    names = [f"sm_{target}" if target.isdigit() else target for target in targets]
    for name in (op for op in ops if REGISTRY[op].candidate("triton") is not None):
        for target in names:
            for line in inspect_triton.facts(name, target):
                print(line, flush=True)
                for shortcoming in line.shortcomings():
                    print(f"    does not hold: {shortcoming}", flush=True)


PRINTERS = {"cuda": print_cuda, "triton": print_triton}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(REGISTRY))
    parser.add_argument("--kernels", nargs="+", choices=PRINTERS, default=list(PRINTERS))
    targets = ["80", "90", "100", "gfx942"]
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets)
    options = parser.parse_args()
    print("static: read from machine code and counted in a simulator; no GPU, no time")
    for kind in options.kernels:
        PRINTERS[kind](options.ops, options.targets)
    print("static: the least time that data sheets allow at real shapes, in bfloat16")
    for line in rooflines():
        print(line)


if __name__ == "__main__":
    main()
