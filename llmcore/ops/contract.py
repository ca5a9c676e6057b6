"""What every contract shares: checks that name the argument, float promotion, and gradients through the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmcore.dispatch import Candidate

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: half types are promoted, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Each given tensor must be a tensor of a floating dtype the ops take, all on one device.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device than the first one's.
    """
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
            raise TypeError(f"{name}: got {tensor.dtype}, expected one of {allowed}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{name}: on {tensor.device}, expected {first.device}, where {first_name} is"
            )


def check_dtype(
    like: torch.Tensor, like_name: str, *, or_float32: bool = False, **tensors: torch.Tensor | None
) -> None:
    """Each given tensor must have `like`'s dtype (or float32 where that is allowed), else TypeError."""
    for name, tensor in tensors.items():
        if (
            tensor is None
            or tensor.dtype == like.dtype
            or (or_float32 and tensor.dtype == torch.float32)
        ):
            continue
        expected = f"{like.dtype}, the dtype of {like_name}" + (
            ", or torch.float32" if or_float32 else ""
        )
        raise TypeError(f"{name}: got {tensor.dtype}, expected {expected}")


def check_shape(expected: Sequence[int], why: str, **tensors: torch.Tensor | None) -> None:
    """Each given tensor must have exactly this shape, else ValueError with `why`."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(expected)}, {why}"
            )


def check_rows(x: torch.Tensor, name: str = "x") -> None:
    """x must have a last axis, else ValueError."""
    if x.ndim == 0:
        raise ValueError(f"{name}: got a scalar, expected at least one axis")


def check_out(
    out: torch.Tensor, shape: Sequence[int], like: torch.Tensor, *inputs: torch.Tensor | None
) -> None:
    """`out` must be able to hold the result as it is, and no input may want a gradient through it.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device, or not contiguous.
        RuntimeError: a gradient is wanted.
    """
    check_floating(x=like, out=out)
    check_dtype(like, "x", out=out)
    check_shape(shape, "the result's shape", out=out)
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {tuple(out.stride())}, expected a contiguous tensor")
    if wants_gradient(out, *inputs):
        raise RuntimeError(
            "out: has no gradient, but an input requires one; call under torch.no_grad() or without out"
        )


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gradients(
    reference: Callable[..., Any], tensors: Sequence[torch.Tensor | None], gradient: Any
) -> list[torch.Tensor | None]:
    """Gradients of the definition with respect to each tensor that requires one; differentiable in turn.

    Kernels' backward passes hand over to it when a gradient of the gradient is wanted (create_graph=True).
    """
    with torch.enable_grad():
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(
                reference(*tensors), wanted, gradient, create_graph=True, allow_unused=True
            )
        )
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def into(out: torch.Tensor, kernel: Candidate, *args: Any) -> torch.Tensor:
    """The result of kernel.forward(*args) written into `out`, without a fresh tensor where the kernel can."""
    if kernel.into is None:
        return out.copy_(kernel.forward(*args))
    kernel.into(*args, out)
    return out


def row_key(x: torch.Tensor, *parameters: torch.Tensor | None) -> Any:
    """What the checks and choices of a row-wise op depend on; None when x or a parameter is no tensor with an axis."""
    try:
        return (
            x.dtype,
            x.device,
            x.shape[-1],
            *[p if p is None else (p.shape, p.dtype, p.device) for p in parameters],
        )
    except (AttributeError, IndexError):
        return None


class KernelFunction(torch.autograd.Function):
    """Base of the contracts' gradients. `record(*args)` is `apply` without its cost.

    torch's apply binds the arguments to forward's signature at every call (22 of 30 microseconds on a tiny tensor);
    outside of functorch transforms and compilation nothing needs that.
    """

    generate_vmap_rule = True

    @classmethod
    def record(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)
