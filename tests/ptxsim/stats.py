"""Execution statistics: instruction counts, global-memory sectors, shared-memory bank conflicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class MemoryStat:
    """Totals for one memory instruction of the kernel text.

    ``units`` counts 32-byte sectors (global) or wavefronts (shared); ``ideal`` is the least that
    the same bytes could have needed.
    """

    where: str
    space: str
    requests: int = 0
    units: int = 0
    ideal: int = 0

    @property
    def per_request(self) -> float:
        return self.units / max(self.requests, 1)

    @property
    def efficiency(self) -> float:
        return self.ideal / max(self.units, 1)


@dataclass
class Stats:
    """What one launch did."""

    instructions: int = 0  # instructions issued, times active threads
    issued: int = 0  # vectorised steps of the simulator
    seconds: float = 0.0
    opcodes: Counter[str] = field(default_factory=Counter)
    memory: dict[int, MemoryStat] = field(default_factory=dict)

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond the unavoidable ones."""
        return sum(s.units - s.ideal for s in self.memory.values() if s.space == "shared")

    @property
    def coalescing(self) -> float:
        """Ideal sectors over fetched sectors for all global accesses."""
        stats = [s for s in self.memory.values() if s.space == "global"]
        return sum(s.ideal for s in stats) / max(sum(s.units for s in stats), 1)

    def report(self) -> str:
        """A table of the memory instructions, worst first."""
        rows = sorted(self.memory.values(), key=lambda s: s.ideal - s.units)
        lines = [
            f"{self.instructions} thread instructions in {self.seconds:.3f} s "
            f"({self.instructions / max(self.seconds, 1e-9) / 1e6:.1f} M/s)"
        ]
        lines += [
            f"{s.units - s.ideal:8d} extra {'sectors' if s.space == 'global' else 'wavefronts'}, "
            f"{s.per_request:6.2f} per request, {s.requests} requests  {s.where}"
            for s in rows
        ]
        return "\n".join(lines)


def _unique_per_row(values: Array, valid: Array) -> Array:
    """(sorted, first): each row sorted, and where a valid value occurs for the first time."""
    ordered = np.sort(np.where(valid, values, np.int64(-1)), axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, first & (ordered >= 0)


def sectors(addr: Array, active: Array, nbytes: int) -> tuple[int, int, int]:
    """(requests, sectors, ideal) of a global access; ``addr`` and ``active`` are (warps, 32)."""
    rows = active.any(axis=1)
    addr, active = addr[rows].astype(np.int64), active[rows]
    _, first = _unique_per_row(addr >> 5, active)
    _, distinct = _unique_per_row(addr, active)
    ideal = -(-distinct.sum(axis=1) * nbytes // 32)
    return int(rows.sum()), int(first.sum()), int(ideal.sum())


def wavefronts(addr: Array, active: Array, nbytes: int) -> tuple[int, int, int]:
    """(requests, wavefronts, ideal) of a shared access.

    Accesses of 8 (16) bytes are served per half (quarter) warp; words of one bank serialise.
    """
    rows = active.any(axis=1)
    addr, active = addr[rows].astype(np.int64), active[rows]
    words = max(nbytes // 4, 1)
    lanes = 32 // words
    addr, active = addr.reshape(-1, lanes), active.reshape(-1, lanes)
    word = ((addr >> 2)[:, :, None] + np.arange(words)).reshape(len(addr), -1)
    ordered, first = _unique_per_row(word, np.repeat(active, words, axis=1))
    counts = np.zeros((len(addr), 32), np.int64)
    np.add.at(counts, (np.nonzero(first)[0], ordered[first] & 31), 1)
    units = counts.max(axis=1, initial=0)
    return int(rows.sum()), int(units.sum()), int((-(-counts.sum(axis=1) // 32)).sum())
