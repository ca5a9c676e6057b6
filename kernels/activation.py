"""gelu, and gate activations times `up`: one elementwise kernel forward, one backward.

A program takes a block of one row (of the whole tensor, where all are contiguous). Each element is
read once and written once: 2 or 3 moved per element forward, 3 or 5 backward; bound by memory.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, rows_of

BLOCK = 1024  # 8 elements a thread of 4 warps: one 128-bit load of a half type


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of x and its derivative, float32. KIND: silu, gelu or gelu_tanh."""
    if KIND == "silu":
        share = 1.0 / (1.0 + tl.exp(-x))
        slope = share * (1.0 + x * (1.0 - share))
    elif KIND == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        # (1 + tanh(u)) / 2 and (1 - tanh(u)) / 2, neither as a difference that cancels.
        double = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share = 1.0 / (1.0 + tl.exp(-double))
        other = 1.0 / (1.0 + tl.exp(double))
        slope = share + x * share * other * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return x * share, slope


@triton.jit
def place(width, BLOCK: tl.constexpr):
    """The row of this program, and the columns of its block."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def forward_kernel(
    gate, up, y, width, gate_stride, up_stride, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = place(width, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)

    result, _ = activate(x, KIND)
    if up is not None:
        result *= tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)

    tl.store(y + row * width + column, result.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy,
    gate,
    up,
    dgate,
    dup,
    width,
    dy_stride,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(width, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)

    value, slope = activate(x, KIND)
    at = row * width + column
    if up is not None:
        tl.store(dup + at, (gradient * value).to(dup.dtype.element_ty), inside)
        gradient *= tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    tl.store(dgate + at, (gradient * slope).to(dgate.dtype.element_ty), inside)


def flat(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each as (rows, width): as one row, where all are contiguous."""
    if all(t is None or t.is_contiguous() for t in tensors):
        return [None if t is None else t.view(1, -1) for t in tensors]
    return [None if t is None else rows_of(t) for t in tensors]


def strides(*rows: torch.Tensor | None) -> list[int]:
    """From row to row of each, 0 where there is none."""
    return [0 if t is None else t.stride(0) for t in rows]


def forward(gate: torch.Tensor, up: torch.Tensor | None, kind: str, out: torch.Tensor) -> None:
    """out = act(gate) * up, act(gate) without `up`; one shape, out contiguous."""
    if gate.numel() == 0:
        return
    rows, others = flat(gate, up)
    assert rows is not None
    grid = (rows.shape[0] * triton.cdiv(rows.shape[1], BLOCK),)
    args = (rows, others, out, rows.shape[1], *strides(rows, others))
    launch(forward_kernel, grid, *args, KIND=kind, BLOCK=BLOCK, num_warps=4)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of gate and up."""
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = None if up is None else torch.empty_like(dgate)
    if gate.numel() == 0:
        return dgate, dup
    dy_rows, rows, others = flat(dy, gate, up)
    assert rows is not None
    grid = (rows.shape[0] * triton.cdiv(rows.shape[1], BLOCK),)
    args = (dy_rows, rows, others, dgate, dup, rows.shape[1], *strides(dy_rows, rows, others))
    launch(backward_kernel, grid, *args, KIND=kind, BLOCK=BLOCK, num_warps=4)
    return dgate, dup
