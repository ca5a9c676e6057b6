"""What a cubin's machine code says by itself: resources, the control-flow graph, the hot loop.

Static facts can refute a kernel, never prove its speed. The tools (nvdisasm, cuobjdump) come with
triton, or with the CUDA toolkit.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FP32 = ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL")
TENSOR = ("HMMA", "IMMA", "HGMMA", "IGMMA", "UTCHMMA")
GLOBAL = ("LDG", "STG", "LDGSTS")
MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG", "RED")


@functools.cache
def tool(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump, None where there is none."""
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    return shutil.which(name)


def why_not() -> str:
    """Why machine code can't be read here; empty when it can."""
    missing = [name for name in ("nvdisasm", "cuobjdump") if tool(name) is None]
    return f"{' and '.join(missing)} not found (triton has them)" if missing else ""


def output(name: str, *arguments: str) -> str:
    command = [str(tool(name)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Resources:
    """Of one thread (registers, bytes of local memory) and one block (static shared memory)."""

    registers: int
    local: int
    shared: int


def resources(cubin: Path) -> dict[str, Resources]:
    """By kernel's mangled name."""
    text = output("cuobjdump", "-res-usage", str(cubin))
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


@dataclass
class Block:
    """Straight-line code: opcodes, and the labels it may go to (None: the following block)."""

    label: str
    opcodes: list[str]
    targets: list[str | None]


@dataclass(frozen=True)
class Loop:
    """Blocks of a natural loop; `always` are those that every turn passes through."""

    opcodes: Counter[str]
    always: Counter[str]


def functions(cubin: Path) -> dict[str, list[Block]]:
    """Each kernel's basic blocks, by its mangled name."""
    found: dict[str, list[Block]] = {}
    for part in re.split(r"\n\s*\.section\s+\.text\.", output("nvdisasm", "-c", str(cubin)))[1:]:
        name = part.split(",", 1)[0].strip('"')
        found[name] = blocks(part)
    return found


def blocks(text: str) -> list[Block]:
    found = [Block("", [], [None])]
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+|\$\S+):", line):
            found.append(Block(label.group(1), [], [None]))
            continue
        parsed = re.match(
            r"\s+(?:/\*[0-9a-f]+\*/\s+)?(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line
        )
        if not parsed or not re.search(r"/\*[0-9a-f]{4,}\*/", line):
            continue
        guard, opcode, rest = parsed.groups()
        found[-1].opcodes.append(opcode)
        target = re.search(r"`\((\.L_\w+)\)", rest)
        name = opcode.split(".")[0]
        if name == "BRA" and target:
            # A predicate may stand among the operands: `BRA P0, ...`, `BRA.U UP0, ...`.
            conditional = bool(guard) or bool(re.match(r"\s*!?U?P\d", rest))
            found[-1].targets = [target.group(1), *([None] if conditional else [])]
            found.append(Block("", [], [None]))
        elif name in ("EXIT", "RET") and not guard:
            found[-1].targets = []
            found.append(Block("", [], [None]))
    return found


def edges(code: list[Block]) -> list[list[int]]:
    at = {block.label: i for i, block in enumerate(code) if block.label}
    following = [
        [at[t] if t is not None else i + 1 for t in block.targets if t is None or t in at]
        for i, block in enumerate(code)
    ]
    return [[t for t in targets if t < len(code)] for targets in following]


def reachable(after: list[list[int]]) -> set[int]:
    found, waiting = {0}, [0]
    while waiting:
        for target in after[waiting.pop()]:
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def dominators(after: list[list[int]]) -> dict[int, set[int]]:
    """For each block that is reached those that every way to it passes through, itself too."""
    alive = reachable(after)
    before: dict[int, list[int]] = {i: [] for i in alive}
    for i in alive:
        for target in after[i]:
            before[target].append(i)
    found = {i: alive.copy() for i in alive}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(alive - {0}):
            new = set.intersection(*(found[b] for b in before[i])) | {i}
            changed, found[i] = changed or new != found[i], new
    return found


def loops(code: list[Block]) -> list[Loop]:
    """Natural loops: one for each edge back to a block that dominates its start."""
    after = edges(code)
    above = dominators(after)
    found = []
    for start in above:
        for head in after[start]:
            if head in above[start]:
                body = natural_loop(after, head, start) & above.keys()
                always = body & above[start]
                found.append(
                    Loop(
                        Counter(op for i in body for op in code[i].opcodes),
                        Counter(op for i in always for op in code[i].opcodes),
                    )
                )
    return found


def natural_loop(after: list[list[int]], head: int, start: int) -> set[int]:
    before: dict[int, set[int]] = {}
    for i, targets in enumerate(after):
        for target in targets:
            before.setdefault(target, set()).add(i)
    body, waiting = {head, start}, [start]
    while waiting:
        block = waiting.pop()
        if block == head:
            continue
        for origin in before.get(block, ()):
            if origin not in body:
                body.add(origin)
                waiting.append(origin)
    return body


def count(opcodes: Counter[str], *names: str) -> int:
    """How many instructions have one of these names, whatever their modifiers."""
    return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in names)


def hot_loop(code: list[Block]) -> Loop:
    """The loop with the most tensor-core instructions; without any, the one that moves the most
    bytes; without a loop, the whole kernel."""

    def weight(loop: Loop) -> tuple[int, int]:
        return count(loop.opcodes, *TENSOR), bits_moved(loop.opcodes)

    everything = Counter(op for block in code for op in block.opcodes)
    best = max(loops(code), key=weight, default=None)
    if best is None or weight(best) == (0, 0):
        return Loop(everything, everything)
    return best


def bits_moved(opcodes: Counter[str], names: tuple[str, ...] = MEMORY) -> int:
    """What a thread's accesses of any memory, or by the named instructions, move."""
    return sum(n * bits_of(op) for op, n in opcodes.items() if op.split(".")[0] in names)


MULTIPLY_ADDS = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
"""Of a warp's HMMA or IMMA, by the modifier that says its tile."""


def multiply_adds(opcodes: Counter[str], warps: int) -> int:
    """Of a block's tensor instructions: HMMA and IMMA are a warp's, HGMMA is that of four."""
    total = 0
    for opcode, n in opcodes.items():
        name, *modifiers = opcode.split(".")
        if name in ("HMMA", "IMMA"):
            total += n * warps * next(MULTIPLY_ADDS[m] for m in modifiers if m in MULTIPLY_ADDS)
        elif name in ("HGMMA", "IGMMA"):
            m, columns, k = map(int, modifiers[0].split("x"))
            total += n * warps // 4 * m * columns * k
    return total


def bits_of(opcode: str) -> int:
    """The width of an access: 32 where its modifiers don't say more."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[m] for m in opcode.split(".") if m in widths), 32)


def narrow_accesses(opcodes: Counter[str], bits: int = 128) -> int:
    """Global loads, stores and copies of less than so many bits."""
    wide = [n for op, n in opcodes.items() if op.split(".")[0] in GLOBAL and bits_of(op) >= bits]
    return count(opcodes, *GLOBAL) - sum(wide)


@dataclass(frozen=True)
class Machine:
    """A GPU, as its data sheet and the CUDA programming guide have it."""

    name: str
    shared: int  # bytes of a multiprocessor; a block takes RESERVED more than it asks for
    bandwidth: float  # bytes a second
    tensor: float  # bf16 operations a second, dense
    multiprocessors: int
    clock: float

    def memory_cycles(self, size: int, warps: int) -> int:
        """Cycles that a multiprocessor's share of the bandwidth takes for a block's bytes, for each
        of the warps that a scheduler has of the block: comparable with Issue's."""
        share = self.bandwidth / self.multiprocessors / self.clock
        return round(size / share * 4 / warps)


A100 = Machine("A100", 164 * 1024, 1.555e12, 312e12, 108, 1.41e9)
H100 = Machine("H100", 228 * 1024, 3.35e12, 989e12, 132, 1.83e9)
RESERVED = 1024


def occupancy(registers: int, shared: int, threads: int, machine: Machine) -> int:
    """Warps of a multiprocessor, of 64, that its registers and shared memory hold."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    by_shared = machine.shared // (shared + RESERVED)
    return min(by_registers, by_shared, 64 // warps, 32) * warps


@dataclass(frozen=True)
class Issue:
    """Cycles of a scheduler that one warp's turn of a loop keeps each unit busy for: of an A100, or
    of an H100 where there is wgmma, which an A100 lacks."""

    tensor: int
    shared: int
    exponential: int
    fp32: int
    slots: int

    @classmethod
    def of(cls, opcodes: Counter[str]) -> Issue:
        """m16n8k16 is 2048 multiply-adds at 256 a cycle; ldmatrix x4 moves 512 bytes at 128 a
        cycle, for the 4 schedulers in turn; 4 lanes do exponentials, 16 float32.

        m64nNk16 is 16 N k multiply-adds for each of 4 schedulers at 512 a cycle, and reads N rows,
        and perhaps 64 of operand A, of 32 bytes; 32 lanes do float32."""
        widths = [
            (int(found.group(1)), n)
            for op, n in opcodes.items()
            if (found := re.match(r"HGMMA\.64x(\d+)x16", op))
        ]
        matrices = sum(
            n for op, n in opcodes.items() if op.startswith("LDSM") and op.endswith(".4")
        )
        return cls(
            tensor=8 * count(opcodes, "HMMA") + sum(n * width // 2 for width, n in widths),
            shared=16 * matrices
            + sum(
                n * bits_of(op) // 8
                for op, n in opcodes.items()
                if op.split(".")[0] in ("LDS", "STS")
            )
            + sum(n * (width + 64) // 4 for width, n in widths),
            exponential=8 * count(opcodes, "MUFU"),
            fp32=(1 if widths else 2) * count(opcodes, *FP32),
            slots=sum(opcodes.values()),
        )

    def bound(self, memory: int = 0) -> str:
        """The unit that is busy for longest; `memory`: cycles of global memory, where all bytes
        come from there."""
        values = {**vars(self), "memory": memory}
        return max(values, key=lambda unit: values[unit])

    def tensor_share(self) -> float:
        """For how much of the time of the busiest unit the tensor cores are busy."""
        return self.tensor / max(vars(self).values())
