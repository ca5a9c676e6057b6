"""gelu: y = x * Phi(x), Phi the normal distribution function; or its tanh approximation.

    none  y = x / 2 * (1 + erf(x / sqrt(2)))
    tanh  y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

Tensors:
    x  any shape; float32, bfloat16, float16 or float64, any strides
    y  x's shape and dtype
Float32: everything; rounded once, into y.
Edge cases: an empty x gives an empty y; NaN gives NaN. At +inf and -inf a result is inf, 0 or NaN,
as torch's is, which differs between its builds.
Errors: TypeError for a dtype, ValueError for another `approximate`.
Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2.

Kernels: forward(x, approximate) -> y; into the same with `out` behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llmcore.dispatch import Op
from llmcore.ops import contract
from llmcore.ops.sample import Draw, Sample

APPROXIMATIONS = ("none", "tanh")


def reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """The definition, in at least float32."""
    return F.gelu(contract.widen(x), approximate=approximate).to(x.dtype)


def check(x: torch.Tensor, approximate: str = "none") -> None:
    """Raises TypeError or ValueError for arguments that don't fit."""
    contract.check_floating(x=x)
    contract.check_choice("approximate", approximate, APPROXIMATIONS)


def samples(draw: Draw) -> Iterator[Sample]:
    for approximate in APPROXIMATIONS:
        for shape in ((draw.size(1, 70), draw.size(1, 700)), (2, 3, 341), (1,), (0, 8)):
            name = "x".join(map(str, (approximate, *shape)))
            yield Sample(name, (draw.normal(*shape) * 2, approximate))
        yield Sample(f"{approximate}_strided", (draw.normal(16, 9).T, approximate))
        yield Sample(f"{approximate}_far", (draw.normal(100) * 20, approximate))


OP = Op(
    "gelu",
    reference,
    check,
    samples,
    cpu="no CPU kernel yet: the definition runs",
    triton="no Triton kernel yet",
    cuda="no CUDA kernel: one elementwise pass is Triton's to fuse",
)


def gelu(
    x: torch.Tensor, approximate: str = "none", *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x * Phi(x), exactly (approximate="none") or by tanh, in float32.

    x of any shape. The result has x's shape and dtype. `out`, contiguous, takes it instead of a
    fresh tensor; no gradient goes through it.

    Raises:
        TypeError, ValueError: an argument doesn't fit; the message names it.
    """
    kernel = OP.kernel(contract.call_key((x,), approximate), x, approximate)
    if out is not None:
        contract.check_out(out, x.shape, x, x)
        return contract.into(out, kernel, x, approximate)
    return kernel.forward(x, approximate)
