"""What `accelerate` did, to be read and to be undone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Swap:
    """A module that runs on llmcore now.

    error  max|new - old| / max|old| on a small input; of a packed weight the share that was lost
    """

    name: str
    structure: str
    error: float


@dataclass(frozen=True)
class Left:
    """A module that has kept its own forward, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What was swapped, what was left and why, and the way back."""

    swapped: list[Swap] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    memory_saved: int = 0
    error: float | None = None
    """max|new - old| / max|old| of the whole model's output on a small input; None: not asked."""
    _steps: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self, down_to: int = 0) -> None:
        """Put everything back, bit for bit, in the reverse order; a second call does nothing."""
        while len(self._steps) > down_to:
            self._steps[-1]()
            self._steps.pop()

    def sort(self, names: list[str]) -> None:
        """In the order of the model's modules."""
        place = {name: i for i, name in enumerate(names)}
        self.swapped.sort(key=lambda swap: place[swap.name])
        self.left.sort(key=lambda left: place[left.name])

    def structures(self) -> dict[str, int]:
        """How many modules of each structure were swapped."""
        counts: dict[str, int] = {}
        for swap in self.swapped:
            counts[swap.structure] = counts.get(swap.structure, 0) + 1
        return counts

    def __str__(self) -> str:
        lines = [f"swapped: {len(self.swapped)} modules"]
        for (name, structure), swaps in _grouped(
            self.swapped, lambda s: (_pattern(s.name), s.structure)
        ).items():
            worst = max(s.error for s in swaps)
            lines.append(f"  {name:<48} x{len(swaps):<4}{structure:<22}error {worst:.1e}")
        lines.append(f"left: {len(self.left)} modules")
        for (name, kind, reason), lefts in _grouped(
            self.left, lambda s: (_pattern(s.name), s.kind, s.reason)
        ).items():
            lines.append(f"  {name:<48} x{len(lefts):<4}{kind}: {reason}")
        if self.error is not None:
            lines.append(f"whole model: error {self.error:.1e}")
        if self.memory_saved:
            lines.append(f"memory saved: {self.memory_saved / 1e6:.1f} MB")
        return "\n".join(lines)


def _pattern(name: str) -> str:
    """A module's name without the numbers of its layers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "(the model)"


def _grouped(items: list, key: Callable) -> dict:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
