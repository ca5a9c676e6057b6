"""What the assembly of an AMD GPU (gfx942) says by itself: registers, spills, the hot loop."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

MOST_WAVES = 32
"""Of a compute unit: 8 on each of 4 SIMDs."""

GLOBAL = ("global_load", "global_store", "buffer_load", "buffer_store")
REGISTERS = 512  # of a lane of a SIMD, vector and accumulation registers together
SHARED = 65536  # bytes of a compute unit


@dataclass(frozen=True)
class Code:
    """vector_registers: with those of accumulators; local: bytes that a lane spills; loop: the
    opcodes of the hot loop, of the whole kernel where there is none."""

    vector_registers: int
    local: int
    loop: Counter[str]


def read(text: str) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        return int(found.group(1)) if found else 0

    return Code(
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        hot_loop(text),
    )


def hot_loop(text: str) -> Counter[str]:
    """Between a label and a branch back to it: the one with the most products, then the most
    bytes moved, then the shortest."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    best: Counter[str] = Counter()
    for line in text.split(".section\t.rodata")[0].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif opcode := re.match(r"\s+([a-z]\w+)(?:\s+(.*))?", line):
            lines.append(opcode.group(1))
            target = (opcode.group(2) or "").split(";")[0].strip()
            if opcode.group(1).startswith(("s_cbranch", "s_branch")) and target in labels:
                best = max(best, Counter(lines[labels[target] :]), key=weight)
    return best if weight(best)[:2] != (0, 0) else Counter(lines)


def weight(loop: Counter[str]) -> tuple[int, int, int]:
    return matrix(loop), bytes_moved(loop), -sum(loop.values())


def count(opcodes: Counter[str], *starts: str) -> int:
    """How many instructions start so."""
    return sum(n for op, n in opcodes.items() if op.startswith(starts))


def matrix(opcodes: Counter[str]) -> int:
    return count(opcodes, "v_mfma")


def multiply_adds(opcodes: Counter[str], waves: int) -> int:
    """Of a block's matrix instructions: v_mfma_f32_32x32x8_bf16 says how many a wave's has."""
    total = 0
    for op, n in opcodes.items():
        if shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", op):
            m, columns, k = map(int, shape.groups())
            total += n * m * columns * k
    return total * waves


def bytes_of(opcode: str) -> int:
    """Of a lane's access: 4 where its name doesn't say more or less."""
    if wide := re.search(r"dwordx(\d)", opcode):
        return 4 * int(wide.group(1))
    return 1 if "byte" in opcode else 2 if "short" in opcode else 4


def bytes_moved(opcodes: Counter[str]) -> int:
    """From and to global memory, by one lane."""
    return sum(n * bytes_of(op) for op, n in opcodes.items() if op.startswith(GLOBAL))


def narrow_accesses(opcodes: Counter[str]) -> int:
    """Global accesses of less than 128 bits."""
    return sum(n for op, n in opcodes.items() if op.startswith(GLOBAL) and bytes_of(op) < 16)


def occupancy(code: Code, shared: int, waves: int) -> int:
    """Waves of a compute unit, of MOST_WAVES, for blocks of so many bytes and waves."""
    granules = max(-(-code.vector_registers // 8) * 8, 8)
    by_registers = min(REGISTERS // granules, 8) * 4 // waves
    by_shared = SHARED // shared if shared else MOST_WAVES
    return min(by_registers, by_shared, MOST_WAVES // waves) * waves
