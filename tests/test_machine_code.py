"""What the compiler made of the kernels, read from the built library by objdump: registers of 512
bits in the levels that may use them and nowhere else, and sums that stay in registers; by nm, that
no function is of two levels.

A loop is a jump backwards inside a function, an inner loop one that holds no other. A sum spills
when an inner loop of multiply-adds takes it from the stack and puts it back in every round.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import setup_script

from llmcore import native

OBJDUMP = shutil.which("objdump")
NM = shutil.which("nm")
COMPILER = shutil.which("g++")

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
LEVEL = re.compile(
    r"7llmcore(?:8(portable)|4(avx2)|11(avx512_bf16)|6(avx512))"
)  # as names are mangled
VECTOR = re.compile(r"%[xyz]mm(\d+)")
MULTIPLY_ADD = re.compile(r"vf(n?)m(add|sub)|vdp|vpdp")
ONLY_AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k[0-7]")
ONLY_BF16 = re.compile(r"vdpbf16ps|vcvtne2?ps2?bf16")

FEWEST = 4
"""Multiply-adds that make a loop one of products."""


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


class Function(NamedTuple):
    name: str
    body: list[Instruction]

    @property
    def level(self) -> str:
        """The instruction-set level that it belongs to; empty for what all of them share."""
        found = LEVEL.search(self.name)
        return next(filter(None, found.groups())) if found else ""


def functions(listing: str) -> Iterator[Function]:
    current = None
    for line in listing.splitlines():
        if title := FUNCTION.match(line):
            if current is not None:
                yield current
            current = Function(title[1], [])
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.body.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    if current is not None:
        yield current


def disassemble(path: Path) -> list[Function]:
    command = [str(OBJDUMP), "-d", "--no-show-raw-insn", str(path)]
    return list(
        functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    )


@functools.cache
def built() -> list[Function]:
    """The functions of the library that these tests run with."""
    if OBJDUMP is None:
        pytest.skip("objdump is not on this machine")
    if native.module is None:
        pytest.skip(native.why_not)
    found = disassemble(Path(str(native.module.__file__)))
    if not any(f.level == "avx512" for f in found):
        pytest.skip("the library was built for another architecture, or without symbols")
    return found


def inner_loops(function: Function) -> Iterator[list[Instruction]]:
    at = {instruction.address: i for i, instruction in enumerate(function.body)}
    spans = set()
    for i, instruction in enumerate(function.body):
        target = re.match(r"([0-9a-f]+)\b", instruction.operands)
        if instruction.name.startswith("j") and target is not None:
            begin = at.get(int(target[1], 16), i + 1)
            if begin <= i:
                spans.add((begin, i))
    for begin, end in spans:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
            yield function.body[begin : end + 1]


def is_product(loop: list[Instruction]) -> bool:
    return sum(bool(MULTIPLY_ADD.match(i.name)) for i in loop) >= FEWEST


def spilled_sums(function: Function, loop: list[Instruction]) -> set[str]:
    """The stack slots that are read first and then take the result of a multiply-add."""
    has_frame = any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in function.body)
    slot_of = re.compile(rf"-?(?:0x[0-9a-f]+)?\(%(?:rsp{'|rbp' if has_frame else ''})\b[^)]*\)")
    written_by: dict[str, str] = {}
    read, stored, found = set(), set(), set()
    for instruction in loop:
        slot, registers = slot_of.search(instruction.operands), VECTOR.findall(instruction.operands)
        if not registers:
            continue
        if slot and instruction.operands.endswith(slot[0]):
            stored.add(slot[0])
            if slot[0] in read and MULTIPLY_ADD.match(written_by.get(registers[-1], "")):
                found.add(slot[0])
            continue
        if slot and slot[0] not in stored:
            read.add(slot[0])
        written_by[registers[-1]] = instruction.name
    return found


def spilling(found: list[Function]) -> dict[str, int]:
    """How many sums spill in each function's inner loops of products."""
    counts = {
        f.name: sum(len(spilled_sums(f, loop)) for loop in inner_loops(f) if is_product(loop))
        for f in found
    }
    return {name: count for name, count in counts.items() if count}


def test_machine_code_wide_registers_in_their_levels_only() -> None:
    wide = {level: 0 for level in native.LEVELS} | {"": 0}
    pairs = dict(wide)
    for function in built():
        level = function.level
        wide[level] += sum(bool(ONLY_AVX512.search(i.operands)) for i in function.body)
        pairs[level] += sum(bool(ONLY_BF16.match(i.name)) for i in function.body)
    assert wide[""] == wide["portable"] == wide["avx2"] == 0, wide
    assert wide["avx512"] > 10_000 and wide["avx512_bf16"] > 10_000, wide
    assert {level for level, count in pairs.items() if count} == {"avx512_bf16"}, pairs


def test_machine_code_portable_has_no_avx() -> None:
    for function in built():
        if function.level in ("", "portable"):
            found = [i for i in function.body if i.name[0] == "v" and VECTOR.search(i.operands)]
            assert not found, f"{function.name}: {found[0]}"


@pytest.mark.parametrize("level", [level for level in native.LEVELS if level != "portable"])
def test_machine_code_sums_stay_in_registers(level: str) -> None:
    mine = [f for f in built() if f.level == level]
    assert sum(is_product(loop) for f in mine for loop in inner_loops(f)) > 50
    found = spilling(mine)
    assert not found, "\n".join(f"{count} sums spill in {name}" for name, count in found.items())


def test_machine_code_levels_share_no_function() -> None:
    """An inline function outside of a level's namespace would be in the objects of all levels, and
    the linker would keep any one: with instructions that this machine may not have."""
    if NM is None:
        pytest.skip("nm is not on this machine")
    for name, path in setup_script.built_objects().items():
        weak = weak_symbols(path)
        assert not weak, f"{name}: {weak}"


def weak_symbols(path: Path) -> list[str]:
    listing = subprocess.run([str(NM), str(path)], check=True, capture_output=True, text=True)
    return [line for line in listing.stdout.splitlines() if line.split()[-2] in ("W", "V", "u")]


@pytest.mark.skipif(COMPILER is None or NM is None, reason="g++ or nm is not here")
def test_machine_code_finds_a_shared_function(tmp_path: Path) -> None:
    source, target = tmp_path / "planted.cpp", tmp_path / "planted.o"
    source.write_text("inline int shared(int x) { return x; } int (*of_level)(int) = &shared;")
    subprocess.run([str(COMPILER), "-c", str(source), "-o", str(target)], check=True)
    assert len(weak_symbols(target)) == 1


PLANTED = """
typedef float vec __attribute__((vector_size(64)));
namespace llmcore { namespace avx512 {
void products(const float* a, const vec* b, vec* c, long depth) {
  vec sum[ROWS][4] = {};
  for (long k = 0; k < depth; ++k)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] += a[k * ROWS + r] * b[4 * k + v];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 4; ++v) c[4 * r + v] = sum[r][v];
}
}}
"""


@pytest.mark.skipif(COMPILER is None or OBJDUMP is None, reason="g++ or objdump is not here")
@pytest.mark.parametrize(("rows", "spills"), [(6, False), (9, True)])
def test_machine_code_finds_planted_spills(rows: int, spills: bool, tmp_path: Path) -> None:
    """32 registers hold 24 sums and what they are made of, but not 36."""
    source, target = tmp_path / "planted.cpp", tmp_path / "planted.o"
    source.write_text(PLANTED)
    flags = ["-O3", "-mavx512f", "-mfma", "-mprefer-vector-width=512", f"-DROWS={rows}"]
    command = [str(COMPILER), *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr:
        pytest.skip("the compiler is for another architecture")
    assert done.returncode == 0, done.stderr
    (function,) = (f for f in disassemble(target) if "products" in f.name)
    assert function.level == "avx512"
    assert any(is_product(loop) for loop in inner_loops(function))
    assert bool(spilling([function])) == spills
