"""How every Triton kernel here is launched: on the tensors' device, with the same options.

Block sizes and warps come from calculation, not from trials: from the width of a row, from the
registers and the shared memory of a multiprocessor. So the same call runs the same code, and gives
the same bits, on every run.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

VECTOR = 16
"""Elements that a thread of a memory-bound kernel holds of a tile: two 128-bit loads of a half
type."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the first tensor's device.

    Products and sums do not fuse by themselves (Triton's default for that changes with its version
    3.10): in a sum over lanes x * x + shuffled would be rounded in another way in each of two lanes
    that store one result, and the bits would depend on which is last. Kernels say tl.fma where it
    pays.
    """
    with torch.cuda.device_of(first_tensor(args)):
        kernel[grid](*args, **meta, enable_fp_fusion=False)


def first_tensor(args: tuple[Any, ...]) -> torch.Tensor | None:
    """The first tensor among arguments, or inside of tuples among them."""
    for a in args:
        found = first_tensor(a) if isinstance(a, tuple) else a
        if isinstance(found, torch.Tensor):
            return found
    return None


def target() -> GPUTarget:
    """The GPU that kernels are built for; the interpreter stands for an sm_80."""
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 80, 32)
    return triton.runtime.driver.active.get_current_target()


def products() -> str:
    """How the target multiplies matrices of half types: "mma" a warp, "wgmma" four of them (sm_90),
    "tcgen05" with its sums in a memory of their own (sm_100), "mfma" AMD's waves."""
    found = target()
    if found.backend == "hip":
        return "mfma"
    return {9: "wgmma", 10: "tcgen05"}.get(found.arch // 10, "mma")


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as torch's own switch for matrix products says."""
    if dtype != torch.float32:
        return "tf32"  # which says nothing about half types
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def factors(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    """What tl.dot gets of x and y: their dtype, or float32 of two, which keeps both as they are.

    (Triton's interpreter multiplies the bits of bfloat16: there it is float32 too.)
    """
    in_bits = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    return torch.float32 if in_bits or x.dtype != y.dtype else x.dtype


def tile_of_rows(width: int) -> dict[str, int]:
    """ROWS, BLOCK and num_warps for whole rows of this width in registers."""
    block = triton.next_power_of_2(width)
    rows = max(1024 // block, 1)
    warps = min(max(rows * block // (32 * VECTOR), 1), 16)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x, not empty, as (rows, width) with neighbours in a row side by side: a view if it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
