"""rms_norm in Triton: one program a row forward, a fixed number of programs over rows backward.

A row is held in registers, so it is read once and written once: 2 elements moved per element
forward, 3 backward, and the arithmetic is hidden behind them (bound by memory). 1/rms is recomputed
by the backward pass. dweight is summed by each of PROGRAMS programs over its own rows, and the
partial sums are added in order: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl

MAX_WIDTH = 65536  # elements of a row in registers; beyond, ptxas spills
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@triton.jit
def inverse_rms(row, width, eps):
    return tl.rsqrt(tl.sum(row * row, 0) / width + eps)


@triton.jit
def forward_kernel(x, weight, y, width, eps, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(x + start + column, inside, other=0.0).to(tl.float32)

    result = row * inverse_rms(row, width, eps)
    if HAS_WEIGHT:
        result *= tl.load(weight + column, inside, other=0.0).to(tl.float32)

    tl.store(y + start + column, result.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy, x, weight, dx, dweight, rows, width, eps, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK], tl.float32)
    r = program
    while r < rows:
        start = r * width
        row = tl.load(x + start + column, inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + start + column, inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(row, width, eps)
        unit = row * inverse
        total += gradient * unit
        gradient *= scale
        result = (gradient - unit * (tl.sum(gradient * unit, 0) / width)) * inverse
        tl.store(dx + start + column, result.to(dx.dtype.element_ty), inside)
        r += tl.num_programs(0)

    tl.store(dweight + program * width + column, total, inside)


def into(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> None:
    """out = rms_norm(x, weight, eps); x (..., C), out contiguous."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)
    weight = weight if weight is None else weight.contiguous()
    forward_kernel[(rows,)](
        x, weight, out, width, eps, HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps
    )


def forward(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """rms_norm(x, weight, eps), (..., C) in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, weight, eps, out)
    return out


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (..., C) and dweight (C), float32: one pass gives both, whichever is needed."""
    x, dy = x.contiguous(), dy.contiguous()
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    dx = torch.empty_like(x)
    programs = min(PROGRAMS, rows)
    partial = x.new_empty((programs, width), dtype=torch.float32)
    if programs > 0:
        block = triton.next_power_of_2(width)
        warps = min(max(block // 512, 1), 16)
        weight = weight if weight is None else weight.contiguous()
        backward_kernel[(programs,)](
            *(dy, x, weight, dx, partial, rows, width, eps),
            HAS_WEIGHT=weight is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return dx, partial.sum(0)
