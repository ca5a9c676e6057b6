"""Static facts of every Triton kernel, compiled as its launcher would compile it, for NVIDIA's and
AMD's GPUs; for sm_80 also what the simulator counts of its memory accesses.

    TRITON_INTERPRET=0 python tests/gpu/inspect_triton.py softmax --json --targets sm_80 gfx942

inspect_kernels.py prints them beside the CUDA kernels'. A process of its own, for the test process
has Triton's interpreter, which compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import amd_code
import inspected_calls
import machine_code
import ptxsim
import torch
import triton_driver
from machine_code import A100, H100, Issue, Loop, count
from triton_driver import Launch

from llmcore.dispatch import REGISTRY
from llmcore.ops.sample import Sample

TARGETS = tuple(triton_driver.TARGETS)


def macs_by_hand(kernel: str, constants: dict[str, Any]) -> int:
    """Multiply-adds of a block's turn of the hot loop, 0 for a kernel without products."""
    c = constants
    if kernel.startswith("attention"):
        tile = c.get("BLOCK_M", 0) * c.get("BLOCK_N", 0)
        k, v = c.get("BLOCK_D", 0), c.get("BLOCK_DV", 0)
        products = {
            "attention.forward_kernel": k + v,  # q k', w v
            "attention_backward.key_kernel": 2 * (k + v),  # k q', v dy', dv, dk
            "attention_backward.query_kernel": 2 * k + v,  # q k', dy v', dq
        }
        return tile * products.get(kernel, 0)
    if kernel.startswith("linear_cross_entropy."):
        return c["BLOCK_M"] * c["BLOCK_V"] * c["BLOCK_C"]
    if kernel == "linear.product_kernel":
        return c["BLOCK_M"] * c["PANELS"] * 16 * c["GROUP"]
    return 0


@dataclass(frozen=True)
class Facts:
    """A kernel's machine code for one target.

    registers: of a thread; local: bytes that a thread spills; shared: bytes of a block;
    occupancy: of `most_warps` that a multiprocessor holds. Of a block's turn of the hot loop
    (without a loop, of the whole kernel): `macs` multiply-adds of its matrix instructions and those
    counted by hand; `loop_bytes` read from and written to global memory; `local_in_loop`
    instructions on spilled registers, and the most of them in a loop over masked blocks; `narrow`
    global accesses of less than 128 bits, `atomics`. bound: the unit that is busy for longest
    (sm_80), and of its time `tensor_share`, in which tensor cores are busy.
    conflicts, coalescing: counted by the simulator (sm_80), else -1.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    local: int
    shared: int
    occupancy: int
    most_warps: int
    instructions: int
    matrix: int
    macs: int
    macs_by_hand: int
    matrix_loads: int
    shared_loads: int
    global_accesses: int
    narrow: int
    loop_bytes: int
    local_in_loop: int
    local_in_masked: int
    atomics: int
    bound: str = ""
    tensor_share: float = 0.0
    conflicts: int = -1
    coalescing: float = -1.0

    @property
    def intensity(self) -> float:
        """Operations for a byte that a block's turn of the hot loop moves."""
        return 2 * self.macs / self.loop_bytes if self.loop_bytes else 0.0

    def __str__(self) -> str:
        text = (
            f"{self.kernel:<46}{self.target:<8}{self.warps:>2} warps{self.registers:>4} registers"
            f"{self.local:>5} local{self.shared:>7} shared  "
            f"{self.occupancy:>2}/{self.most_warps} warps  loop {self.instructions:>4}: "
            f"{self.matrix} matrix, {self.matrix_loads} ldmatrix, {self.shared_loads} shared, "
            f"{self.global_accesses} global ({self.narrow} below 128 bits), "
            f"{self.local_in_loop} local ({self.local_in_masked} in masked blocks)"
        )
        if self.macs_by_hand:
            text += f", {self.macs / self.macs_by_hand:.2f} of the products by hand"
            text += f", {self.intensity:.0f} operations a byte"
        if self.bound:
            text += f", bound by {self.bound}"
            if self.bound != "memory":
                text += f" (tensor cores {self.tensor_share:.0%})"
        if self.conflicts >= 0:
            text += f"; {self.conflicts} bank conflicts, {self.coalescing:.0%} coalesced"
        return text

    def shortcomings(self) -> Iterator[str]:
        """What a fast kernel would not have, with the reason where there is one."""
        by_rows = self.kernel.startswith(BY_ROWS)
        found = {
            f"{self.local_in_loop} accesses of local memory in the loop": self.local_in_loop,
            f"{self.atomics} atomics in the loop": self.atomics,
            f"the tensor cores wait for: {self.bound}": self.bound not in ("", "tensor"),
            f"{self.narrow} global accesses of less than 128 bits": self.narrow and not by_rows,
            f"{self.conflicts} bank conflicts": self.conflicts > 0,
            f"{self.coalescing:.0%} coalesced": 0 <= self.coalescing < 0.95,
        }
        whats = ("local", "atomic", "bound", "narrow", "conflicts", "coalescing")
        for what, (text, holds) in zip(whats, found.items(), strict=True):
            if holds:
                reasons = (
                    reason
                    for (of, kernel), reason in REASONS.items()
                    if of == what and re.match(kernel, self.kernel)
                )
                yield f"{text} ({next(reasons, 'no reason')})"


BY_ROWS = ("attention_backward.delta_kernel", "attention.combine_kernel", "linear.quantize_kernel")
"""Kernels of few bytes, which give each row a number."""

DECODING = r"attention\.forward_kernel .*split"
REASONS = {
    (
        "local",
        r"attention\.forward_kernel D=128 M=128",
    ): "a packed sequence's place takes registers",
    ("bound", DECODING): "each byte of k and v is read once, from global memory",
    ("bound", r"linear\.product_kernel int8"): "each byte of the weight is read once",
    ("bound", r"linear\.product_kernel int4"): "halves of bytes become bytes one by one",
    (
        "bound",
        r"attention_backward\.query_kernel",
    ): "16 rows a warp, or 16 keys a turn: with more of "
    "both the compiler, which keeps whole tiles of k, v and k again as operands, spills",
    ("bound", r"attention_backward\.key_kernel"): "the compiler shares one direction of a chain of "
    "products among warps, so each loads all rows; tiles with more products for a load spill",
    ("narrow", r"attention_backward\.key_kernel"): "lse and delta, a float of each row",
    ("narrow", DECODING): "a key's page",
    ("narrow", r"linear\.product_kernel"): "scales and sums of a group",
    ("conflicts", r"attention\.forward_kernel"): "in masked blocks only: there v is looked through "
    "for NaN too, and the compiler swizzles what feeds products alone",
    ("conflicts", r"linear\.product_kernel"): "4 columns by 8 outputs of a panel, 64 bytes between "
    "columns, lie in 16 banks: two wavefronts instead of one",
}
"""By shortcoming, and kernel."""


def label(launch: Launch) -> str:
    """The kernel, and which of its variants."""
    c = launch.constants
    parts = [launch.kernel]
    if "WIDTH" in c and launch.kernel.startswith("attention"):
        parts.append(f"D={c['WIDTH']}")
    if c.get("SPLIT"):
        parts.append("split")
    if "BITS" in c:
        parts.append(f"int{c['BITS']}")
    if "BLOCK_M" in c:
        parts.append(f"M={c['BLOCK_M']}")
    return " ".join(parts)


def sample_launches(target: str, sample: Sample, name: str) -> list[Launch]:
    """What a bfloat16 call and its gradient launch; on sm_80 they are executed."""
    gpu = triton_driver.SimulatedGPU(target)
    args, options = sample.cast(torch.bfloat16, "cpu")
    op = REGISTRY[name]
    if inspected_calls.has_gradient(name, sample):
        for argument in args[: inspected_calls.DIFFERENTIABLE.get(name)]:
            if torch.is_tensor(argument) and argument.is_floating_point():
                argument.requires_grad_()
    with triton_driver.on_gpu(gpu):
        result = op.function(*args, **options)
        outputs = result if isinstance(result, tuple) else (result,)
        wanted = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        if wanted:
            torch.autograd.grad([o.sum() for o in outputs if o.requires_grad], wanted)
    return gpu.launches


@dataclass
class Traffic:
    """What the simulator counted of a kernel."""

    conflicts: int = 0
    sectors: int = 0
    ideal: int = 0


def traffic_of(launch: Launch) -> Traffic:
    stats = ptxsim.launch_triton(launch.compiled, launch.grid, [*launch.arguments], statistics=True)
    found = Traffic(stats.bank_conflicts)
    for access in stats.memory.values():
        if access.space == "global":
            found.sectors += access.units
            found.ideal += access.ideal
    return found


def facts(name: str, target: str, simulate: bool = True) -> Iterator[Facts]:
    """Of each kernel that the op's calls launch, once for each variant."""
    seen: set[str] = set()
    for sample in inspected_calls.samples(name):
        for launch in sample_launches(target, sample, name):
            if (title := label(launch)) in seen:
                continue
            seen.add(title)
            if target.startswith("gfx"):
                yield amd_facts(launch, target, title)
            else:
                yield nvidia_facts(launch, target, title, simulate)


def steady_loop(code: list[machine_code.Block]) -> tuple[Loop, list[Loop]]:
    """The hot loop, and every one with as many products: of those the hot one is the shortest."""
    hot = machine_code.hot_loop(code)
    tensor = count(hot.opcodes, *machine_code.TENSOR)
    if not tensor:
        return hot, [hot]
    alike = [
        loop
        for loop in machine_code.loops(code)
        if count(loop.opcodes, *machine_code.TENSOR) == tensor
    ] or [hot]
    return min(alike, key=lambda loop: sum(loop.opcodes.values())), alike


def nvidia_facts(launch: Launch, target: str, title: str, simulate: bool) -> Facts:
    compiled, meta = launch.compiled, launch.compiled.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = machine_code.functions(Path(file.name))[meta.name]
        used = machine_code.resources(Path(file.name))[meta.name]
    loop, alike = steady_loop(code)
    ops, threads = loop.opcodes, 32 * meta.num_warps
    machine = A100 if target == "sm_80" else H100
    macs = machine_code.multiply_adds(ops, meta.num_warps)
    if count(ops, "UTCHMMA"):
        macs = ptx_multiply_adds(compiled.asm["ptx"])
    traffic = Traffic(-1)
    if target == "sm_80" and simulate:
        traffic = traffic_of(launch)
    hand = macs_by_hand(launch.kernel, launch.constants)
    return Facts(
        title,
        target,
        meta.num_warps,
        used.registers,
        used.local,
        meta.shared,
        machine_code.occupancy(used.registers, meta.shared, threads, machine),
        64,
        sum(ops.values()),
        count(ops, *machine_code.TENSOR),
        macs,
        hand,
        count(ops, "LDSM"),
        count(ops, "LDS"),
        count(ops, *machine_code.GLOBAL),
        machine_code.narrow_accesses(ops),
        threads * machine_code.bits_moved(ops, machine_code.GLOBAL) // 8,
        count(ops, "LDL", "STL"),
        max(count(one.opcodes, "LDL", "STL") for one in alike),
        count(ops, "ATOM", "ATOMG", "RED"),
        bound_of(title, loop, meta.num_warps) if hand and target == "sm_80" else "",
        Issue.of(loop.always).tensor_share(),
        traffic.conflicts,
        traffic.ideal / max(traffic.sectors, 1) if traffic.conflicts >= 0 else -1.0,
    )


READ_ONCE = re.compile(r"attention\.forward_kernel D=\d+ split|linear\.product_kernel")
"""Kernels whose loop reads bytes that no other program does: they come from global memory."""


def bound_of(title: str, loop: Loop, warps: int) -> str:
    """The unit that an A100's scheduler waits for longest in a turn of the loop.

    Narrow accesses are a few numbers of rows and groups, which many threads or programs share.
    """
    memory = 0
    if READ_ONCE.match(title):
        wide = Counter({op: n for op, n in loop.opcodes.items() if machine_code.bits_of(op) >= 128})
        size = 32 * warps * machine_code.bits_moved(wide, machine_code.GLOBAL) // 8
        memory = A100.memory_cycles(size, warps)
    return Issue.of(loop.always).bound(memory)


def ptx_multiply_adds(text: str) -> int:
    """Of the loop of PTX with the most: fifth-generation products say their tile in a descriptor.

    Its bits 17 to 22 are N / 8, 24 to 28 M / 16 (PTX manual, instruction descriptor of kind f16),
    where K is 16.
    """
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", text))
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []  # line, multiply-adds
    best = 0
    for number, line in enumerate(text.splitlines()):
        if label := re.match(r"(\$\w+):", line):
            labels[label.group(1)] = number
        elif mma := re.search(r"tcgen05\.mma.*,\s*(%r\d+), %p\d+;", line):
            bits = int(constants[mma.group(1)])
            found.append((number, 16 * (bits >> 17 & 63) * 8 * (bits >> 24 & 31) * 16))
        elif (branch := re.search(r"bra(?:\.uni)?\s+(\$\w+);", line)) and branch[1] in labels:
            best = max(best, sum(macs for at, macs in found if at > labels[branch[1]]))
    return best


def amd_facts(launch: Launch, target: str, title: str) -> Facts:
    meta = launch.compiled.metadata
    code = amd_code.read(launch.compiled.asm["amdgcn"])
    ops = code.loop
    threads = 64 * meta.num_warps
    return Facts(
        title,
        target,
        meta.num_warps,
        code.vector_registers,
        code.local,
        meta.shared,
        amd_code.occupancy(code, meta.shared, meta.num_warps),
        amd_code.MOST_WAVES,
        sum(ops.values()),
        amd_code.matrix(ops),
        amd_code.multiply_adds(ops, meta.num_warps),
        macs_by_hand(launch.kernel, launch.constants),
        0,
        amd_code.count(ops, "ds_read", "ds_load"),
        amd_code.count(ops, *amd_code.GLOBAL),
        amd_code.narrow_accesses(ops),
        threads * amd_code.bytes_moved(ops),
        amd_code.count(ops, "scratch_"),
        0,
        amd_code.count(ops, "global_atomic", "buffer_atomic"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-simulation", dest="simulate", action="store_false")
    options = parser.parse_args()
    names = [name for name, op in REGISTRY.items() if op.candidate("triton") is not None]
    for name in options.ops or names:
        for target in options.targets:
            for found in facts(name, target, options.simulate):
                text = json.dumps({"op": name, **asdict(found)}) if options.json else found
                print(text, flush=True)


if __name__ == "__main__":
    main()
