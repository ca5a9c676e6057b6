"""ptxsim: execute and check PTX kernels on a machine without a GPU."""

from .errors import (
    AsyncCopyHazard,
    BarrierError,
    KernelFault,
    LaunchError,
    Livelock,
    Misaligned,
    OutOfBounds,
    PtxSimError,
    PtxSyntaxError,
    RaceHazard,
    ReadOnlyWrite,
    Trap,
    UninitialisedRead,
    UnsupportedInstruction,
    WarpMaskError,
)
from .launch import Module, launch_triton, load
from .machine import Options
from .stats import MemoryStat, Stats

__all__ = [
    "AsyncCopyHazard",
    "BarrierError",
    "KernelFault",
    "LaunchError",
    "Livelock",
    "MemoryStat",
    "Misaligned",
    "Module",
    "Options",
    "OutOfBounds",
    "PtxSimError",
    "PtxSyntaxError",
    "RaceHazard",
    "ReadOnlyWrite",
    "Stats",
    "Trap",
    "UninitialisedRead",
    "UnsupportedInstruction",
    "WarpMaskError",
    "launch_triton",
    "load",
]
