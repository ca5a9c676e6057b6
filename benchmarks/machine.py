"""What a result was measured on: CPU, instruction sets, versions, commit. Where results go."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import llmcore
from llmcore import device, native

CHECKOUT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """How many processes want a CPU, over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def apart() -> tuple[float, float] | None:
    """Nanoseconds that a cache line takes from one of our CPUs to others: the least, the most.

    Of the first 16 CPUs. Those that share a cache are near, those of other sockets far; a virtual
    machine's may move between the two, and what its cores hand to each other takes longer then.
    None where there is one CPU, or it cannot be measured.
    """
    if native.module is None or not hasattr(os, "sched_getaffinity"):
        return None
    one, *others = sorted(os.sched_getaffinity(0))[:16]
    found = [
        1e9 * min(native.module.exchange_seconds(one, cpu) for _ in range(3)) for cpu in others
    ]
    return (min(found), max(found)) if found and min(found) >= 0 else None


def is_checkout() -> bool:
    """Whether these benchmarks run from a source tree."""
    return (CHECKOUT / "csrc" / "ops.h").is_file()


def git(*arguments: str) -> str:
    """Git's answer on the source tree; empty where there is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str | None:
    """The commit of the source tree, marked when files differ from it; None without one."""
    found = git("rev-parse", "--short=12", "HEAD") if is_checkout() else ""
    return found + ("+changes" if git("status", "--porcelain") else "") if found else None


def name() -> str:
    """A folder's name for this machine: its CPU, the best level that runs, its cores."""
    parts = [device.cpu_name(), device.best_cpu_level() or "no-native", f"{cores()}-cores"]
    return re.sub(r"[^a-z0-9_]+", "-", " ".join(parts).lower()).strip("-")


def describe() -> dict[str, Any]:
    """All of it, for the JSON."""
    levels = device.cpu_levels()
    return {
        "name": name(),
        "cpu": device.cpu_name(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "levels": [level for level, lacks in levels.items() if not lacks],
        "native": native.why_not or f"built by {native.module and native.module.COMPILER}",
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "llmcore": llmcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": load(),
        "apart_ns": apart(),
    }


def results_file() -> Path:
    """Where a result goes unless told otherwise: in the source tree, or in the current folder."""
    folder = CHECKOUT / "benchmarks" / "results" if is_checkout() else Path("benchmarks-results")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return folder / name() / f"{stamp}.json"
