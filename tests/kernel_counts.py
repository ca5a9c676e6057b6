"""What is executed of each GPU kernel on a machine without a GPU; run_report.py prints it.

Kernels are named "cuda softmax_forward_kernel", "triton softmax.forward_kernel". Launches are told
apart by what they are launched with: the shapes and strides of tensors, numbers, constants, the
grid.
"""

from __future__ import annotations

import zlib
from typing import Any


def digest(*what: Any) -> int:
    """A number for a launch's grid and arguments, the same for tensors alike."""
    return zlib.crc32(repr(plain(what)).encode())


def plain(value: Any) -> Any:
    """Tensors as dtype, shape and strides; tuples and dicts entry by entry."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if hasattr(value, "untyped_storage"):
        return [str(value.dtype), *value.shape, *value.stride()]
    return value if isinstance(value, bool | int | float | str | bytes) else str(type(value))


Executed = dict[str, tuple[list[int], int]]
"""By kernel: its launches' digests, and thread instructions (0 in the interpreter)."""


class Recorder:
    """Collects what is executed until somebody takes it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[set[int], int]] = {}

    def add(self, kernel: str, launch: int, instructions: int = 0) -> None:
        launches, before = self._found.get(kernel, (set(), 0))
        self._found[kernel] = (launches | {launch}, before + instructions)

    def take(self) -> Executed:
        """What was added since the last time."""
        found = {kernel: (sorted(launches), n) for kernel, (launches, n) in self._found.items()}
        self._found = {}
        return found


class Summary:
    """A whole run's, from the properties that its tests recorded."""

    KINDS = ("interpreted", "simulated", "fault_caught")
    """Properties: Executed twice, and (kernel, the planted fault's name)."""

    def __init__(self) -> None:
        self.interpreted, self.simulated = Recorder(), Recorder()
        self.faults: dict[str, set[str]] = {}

    def add(self, kind: str, value: Any) -> None:
        if kind == "fault_caught":
            kernel, fault = value
            self.faults.setdefault(kernel, set()).add(fault)
            return
        recorder = self.interpreted if kind == "interpreted" else self.simulated
        for kernel, (launches, instructions) in value.items():
            for launch in launches:
                recorder.add(kernel, launch)
            recorder.add(kernel, launches[0], instructions)

    def lines(self) -> list[str]:
        """A table of the kernels; none where nothing was executed."""
        interpreted, simulated = self.interpreted.take(), self.simulated.take()
        kernels = sorted({*interpreted, *simulated, *self.faults})
        if not kernels:
            return []
        rows = [("", "interpreter", "simulator", "instructions", "faults caught")]
        for kernel in kernels:
            launches, instructions = simulated.get(kernel, ([], 0))
            numbers = (len(interpreted.get(kernel, ([], 0))[0]), len(launches), instructions)
            caught = sorted(self.faults.get(kernel, ()))
            shown = (f"{n:,}" if n else "-" for n in numbers)
            rows.append((kernel, *shown, f"{len(caught)}: {', '.join(caught)}" if caught else "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3))
            + f"  {row[4]}"
            for row in rows
        ]
