"""How long this process's threads had work and no core: what other programs took from a timing.

The kernel counts it to the nanosecond. CPU time does not do: a running thread's goes on by ticks of
4 ms here, so that a probe of 30 ms on two undisturbed threads said anything from 76 to 104 % of
their cores (2026-11-28).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

DISTURBED = 0.05
"""The share of a timing for which threads may have waited, all together: what it has cost at most.
Above it the timing is said to be noisy."""


class Waiting:
    """What this process's threads wait from here on."""

    def __init__(self) -> None:
        self.before, self.start = waits(), time.perf_counter()

    def share(self) -> float | None:
        """Of the time until now, over all threads; None where nobody counts it."""
        now, seconds = waits(), time.perf_counter() - self.start
        if not now:
            return None
        return sum(s - self.before.get(task, 0.0) for task, s in now.items()) / seconds


def waits(tasks: Path = Path("/proc/self/task")) -> dict[str, float]:
    """Seconds that each thread of this process ever waited; empty where nobody counts them."""
    found = {}
    for task in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found[task.parent.name] = int(task.read_text().split()[1]) / 1e9
    return found


def is_disturbed(share: float | None) -> bool:
    """False also where it is not known."""
    return share is not None and share > DISTURBED
