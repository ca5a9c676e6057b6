"""The structs of csrc/ops.h as ctypes, read from the header itself."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "ops.h"
SCALARS = {
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


TEXT = re.sub(r"//[^\n]*", "", HEADER.read_text())
ENUMS = re.findall(r"enum class (\w+) : int32_t", TEXT)


@functools.cache
def struct(name: str) -> type[ctypes.Structure]:
    """A struct of plain data by its name; an enum among its fields is an int32."""
    found = re.search(rf"struct {name} \{{\n(.*?)\n\}};", TEXT, re.S)
    assert found, f"csrc/ops.h has no struct {name}"
    fields: list[tuple] = []
    for kind, pointer, variables in re.findall(r"(?:const )?(\w+)(\*?) ([^;]+);", found.group(1)):
        basic = ctypes.c_void_p if pointer else field_type(kind)
        for variable in variables.split(","):
            label, length = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", variable).groups()
            fields.append((label, basic * int(length) if length else basic))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def field_type(kind: str) -> type:
    if kind in ENUMS:
        return ctypes.c_int32
    return SCALARS.get(kind) or struct(kind)
