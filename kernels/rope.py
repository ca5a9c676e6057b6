"""rope in Triton: a program turns the pairs of a few positions of one head.

Each element of x is read once and written once; cos and sin come from the cache for all heads but
the first. Interleaved pairs are loaded as neighbours and parted in registers, so that all loads are
of 128 bits in both layouts. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

ELEMENTS = 2048  # of a program's tile: 16 a thread of 4 warps


@triton.jit
def turn_kernel(
    x,
    cos,
    sin,
    y,
    heads,
    length,
    x_batch_stride,
    x_head_stride,
    x_stride,
    angle_batch_stride,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    blocks = tl.cdiv(length, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = head // heads
    source = x + batch * x_batch_stride + (head % heads) * x_head_stride + row * x_stride
    sink = y + head * length * WIDTH + row * WIDTH

    if HALF > 0:
        pair = tl.arange(0, BLOCK)[None, :]
        inside = (row < length) & (pair < HALF)
        angle = batch * angle_batch_stride + row * HALF + pair
        c = tl.load(cos + angle, inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, inside, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK)[None, :]
            inside = (row < length) & (both < 2 * HALF)
            pairs = tl.load(source + both, inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, (ROWS, BLOCK, 2)))
            turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * BLOCK))
            tl.store(sink + both, turned.to(y.dtype.element_ty), inside)
        else:
            a = tl.load(source + pair, inside, other=0.0).to(tl.float32)
            b = tl.load(source + HALF + pair, inside, other=0.0).to(tl.float32)
            tl.store(sink + pair, (a * c - b * s).to(y.dtype.element_ty), inside)
            tl.store(sink + HALF + pair, (b * c + a * s).to(y.dtype.element_ty), inside)

    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (row < length) & (column < WIDTH)
        tl.store(sink + column, tl.load(source + column, inside), inside)


def turn(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: torch.Tensor,
    *,
    back: bool = False,
) -> None:
    """out = x turned by the angles, or back; x (B, H, T, D), out contiguous and perhaps x."""
    if x.numel() == 0:
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, width = x.shape
    half = cos.shape[-1]
    block = triton.next_power_of_2(half) if half else 1
    rows = min(max(ELEMENTS // triton.next_power_of_2(width), 1), triton.next_power_of_2(length))
    launch(
        turn_kernel,
        (batch * heads * triton.cdiv(length, rows),),
        *(x, cos, sin, out, heads, length, *x.stride()[:3]),
        cos.stride(0) if cos.ndim == 3 else 0,
        WIDTH=width,
        HALF=half,
        BACK=back,
        INTERLEAVED=interleaved,
        ROWS=rows,
        BLOCK=block,
        REST=triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0,
        num_warps=4,
    )


def into(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor
) -> None:
    """out = rope(x, cos, sin), contiguous."""
    turn(x, cos, sin, interleaved, out)


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """rope(x, cos, sin), of x's shape and dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    into(x, cos, sin, interleaved, out)
    return out


def backward(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """dx: dy turned back."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    turn(dy, cos, sin, interleaved, dx, back=True)
    return dx
