"""The most memory that a call holds at a time beyond its results: what it needs to work in.

Measured as the system counts it, resident pages of the process, so that everything is in it: the
allocator of torch, our scratch, what a library takes for itself. Memory that was freed but kept by
the C library, or by llmcore for its next call, is given back before (it would hide what a call
takes), and after (it would look like results). What stays from the first call on, as a library's
cache, is nobody's extra.

Torch's profiler sees its own allocator only, and a child process for each contender, which would
see the same as this, would spend seconds on starting and on warming up.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

from llmcore import native

from .timing import Contender

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"
"""Written to CLEAR; see proc(5)."""


def can_be_measured() -> bool:
    """Whether this system says what is asked of it here: Linux with glibc."""
    return CLEAR.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def give_back() -> None:
    """Pages that were freed go to the system."""
    if native.module is not None:
        native.module.release_scratch()
    ctypes.CDLL(None).malloc_trim(0)


def status(name: str) -> int:
    """A figure of the process in bytes: "VmRSS", now resident, or "VmHWM", the most of it."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def peak_beyond_results(contender: Contender) -> int:
    """Bytes in one call; the call was made before."""
    with contender.context():
        give_back()
        CLEAR.write_text(FORGET_THE_PEAK)
        results = contender.call()
        peak = status("VmHWM")
        give_back()
        extra = peak - status("VmRSS")
    del results
    return max(extra, 0)


def extra(contender: Contender, calls: int = 2) -> int | None:
    """The least of some calls, others' pages being noise; None where it cannot be measured."""
    with contextlib.suppress(OSError):  # a system that has the files and refuses them
        if can_be_measured():
            return min(peak_beyond_results(contender) for _ in range(calls))
    return None
