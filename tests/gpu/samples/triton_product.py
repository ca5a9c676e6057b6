"""Products that Triton compiles to wgmma, executed in the simulator against NumPy: an independent
word on what a descriptor means, for another compiler chose the layouts. Prints a line for each.

    TRITON_INTERPRET=0 python tests/gpu/samples/triton_product.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ptxsim


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a b over STEPS * K; an operand that lies across is contiguous along M or N."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for step in range(STEPS):
        k = step * K + depth
        a_at = k[None, :] * M + rows[:, None] if A_ACROSS else rows[:, None] * STEPS * K + k
        b_at = k[:, None] * N + columns if B_ACROSS else columns[None, :] * STEPS * K + k[:, None]
        c = tl.dot(tl.load(a_ptr + a_at), tl.load(b_ptr + b_at), c)
    tl.store(c_ptr + rows[:, None] * N + columns, c)


SHAPES = [  # M, N, K, and which operands lie across
    (64, 64, 64, False, True),
    (64, 128, 64, False, True),
    (128, 64, 32, False, False),
    (64, 32, 16, True, True),
    (128, 128, 64, True, False),
]


def run(m: int, n: int, k: int, a_across: bool, b_across: bool, steps: int = 3) -> str:
    constants = {"STEPS": steps, "M": m, "N": n, "K": k, "A_ACROSS": a_across, "B_ACROSS": b_across}
    names = ("a_ptr", "b_ptr", "c_ptr")
    signature = {
        **dict(zip(names, ("*bf16", "*bf16", "*fp32"), strict=True)),
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(product, signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    torch.manual_seed(0)
    a, b = torch.randn(m, steps * k).bfloat16(), torch.randn(steps * k, n).bfloat16()
    c = torch.zeros(m, n)
    stored = (a.T if a_across else a).contiguous(), (b if b_across else b.T).contiguous()
    ptxsim.launch_triton(compiled, 1, [*stored, c])
    error = (c - a.float() @ b.float()).abs().max().item()
    count = compiled.asm["ptx"].count("wgmma.mma_async")
    return f"{m}x{n}x{k} {a_across:d}{b_across:d}: {count} wgmma, error {error:.1e}"


if __name__ == "__main__":
    for shape in SHAPES:
        print(run(*shape), flush=True)
