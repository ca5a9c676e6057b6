"""What contracts share: checks that name the argument, promotion, gradients of the definition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from llmcore import native
from llmcore.dispatch import Candidate

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


WIDEST = 65536
"""Elements of a row that Triton's row-wise kernels hold in registers."""


def refuses_wide_rows(x: torch.Tensor, *rest: Any, axis: int = -1) -> list[str]:
    """Why Triton's row-wise kernels can't take x."""
    if x.shape[axis] <= WIDEST:
        return []
    return [f"width {x.shape[axis]}: this kernel holds a row of at most {WIDEST} in registers"]


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: half types are promoted, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def promote(x: Any, y: Any) -> tuple[Any, Any]:
    """Both in the dtype that x + y has; as they are where the check has something to say."""
    dtypes = [t.dtype for t in (x, y) if isinstance(t, torch.Tensor) and t.dtype in FLOATS]
    if len(dtypes) < 2 or dtypes[0] == dtypes[1]:
        return x, y
    dtype = torch.promote_types(*dtypes)
    return x.to(dtype), y.to(dtype)


def check_floating(
    optional: Mapping[str, torch.Tensor | None] | None = None, /, **tensors: torch.Tensor
) -> None:
    """Each must be a tensor of a floating dtype the ops take, all on one device.

    Those in `optional` may be None.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device than the first one's.
    """
    first_name, first = "", None
    given = {name: t for name, t in (optional or {}).items() if t is not None}
    for name, tensor in {**tensors, **given}.items():
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
    """Each given tensor must have `like`'s dtype (or float32 where allowed), else TypeError."""
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


def check_integers(
    like: torch.Tensor, like_name: str, shape: Sequence[int], why: str, **tensors: Any
) -> None:
    """Each given tensor must be int32 or int64, of this shape, on `like`'s device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got {tensor.dtype}, expected int32 or int64")
        check_shape(shape, why, **{name: tensor})
        check_device(like, like_name, **{name: tensor})


def check_device(like: torch.Tensor, like_name: str, **tensors: torch.Tensor | None) -> None:
    """Each given tensor must be on `like`'s device, else ValueError."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name}: on {tensor.device}, expected {like.device}, where {like_name} is"
            )


def check_mask(mask: Any, shape: Sequence[int], like: torch.Tensor, like_name: str) -> None:
    """`mask` must be bool, float32 or of `like`'s dtype and broadcast to `shape`; None is fine.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another device, or a shape that does not broadcast.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, like.dtype):
        raise TypeError(
            f"mask: got {mask.dtype}, expected torch.bool, torch.float32 or {like.dtype}, "
            f"the dtype of {like_name}"
        )
    check_device(like, like_name, mask=mask)
    fits = mask.ndim <= len(shape) and all(
        mine in (1, full) for mine, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to {tuple(shape)}"
        )


def check_number(low: float, high: float, **numbers: Any) -> None:
    """Each must be a number in [low, high]; TypeError for what is no number, else ValueError."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, float | int):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if not low <= number <= high:  # so that NaN fails too
            raise ValueError(f"{name}: got {number}, expected a number in [{low}, {high}]")


def check_choice(name: str, got: object, choices: Sequence[object]) -> None:
    """`got` must be one of `choices`, else ValueError."""
    if got not in choices:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}")


def check_rows(x: torch.Tensor, name: str = "x") -> None:
    """x must have a last axis, else ValueError."""
    if x.ndim == 0:
        raise ValueError(f"{name}: got a scalar, expected at least one axis")


def check_out(
    out: torch.Tensor,
    shape: Sequence[int],
    like: torch.Tensor,
    *inputs: torch.Tensor | None,
    in_place: bool = True,
) -> None:
    """`out` must be able to hold the result as it is, and no input may want a gradient through it.

    It may be an input of its shape where `in_place` says so (the op's row-wise kernels read a row,
    or an element, before they write it), but must not share a part of one's memory.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device, not contiguous, or overlapping an input.
        RuntimeError: a gradient is wanted.
    """
    check_result(out, shape, like, inputs)
    check_apart((out,), inputs, len(inputs) if in_place else 0)


def check_out_pair(
    out: Sequence[torch.Tensor],
    shape: Sequence[int],
    like: torch.Tensor,
    *inputs: torch.Tensor | None,
) -> None:
    """check_out for an op with two results, which must not share memory.

    Only the first two inputs (x and residual) may be an out: the parameters are read after the sum
    is written.
    """
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"out: expected a pair of tensors, got {type(out).__name__}")
    for tensor in out:
        check_result(tensor, shape, like, inputs)
    if out[0] is out[1]:
        raise ValueError("out: got one tensor twice, expected two")
    check_apart(out, inputs, 2)


def check_result(
    out: torch.Tensor,
    shape: Sequence[int],
    like: torch.Tensor,
    inputs: Sequence[torch.Tensor | None],
) -> None:
    """What check_out asks of `out` by itself."""
    fits = (
        isinstance(out, torch.Tensor)
        and out.dtype == like.dtype
        and out.device == like.device
        and out.shape == shape
    )
    if not fits:  # these say why, and cost more
        check_floating(x=like, out=out)
        check_dtype(like, "x", out=out)
        check_shape(shape, "the result's shape", out=out)
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {tuple(out.stride())}, expected a contiguous tensor")
    if wants_gradient(out, *inputs):
        raise RuntimeError(
            "out: has no gradient, but an input requires one; call without it or in torch.no_grad()"
        )


def check_apart(
    outs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor | None], in_place: int
) -> None:
    """No memory may be shared, but an out may be one of the first `in_place` inputs as a whole.

    All are on one device; what has no address to be asked for counts as apart.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    spans = [memory(out) for out in outs]
    if len(outs) == 2 and overlap(*spans):
        raise ValueError("out: the two tensors share memory, expected two apart")
    for i, tensor in enumerate(inputs):
        if tensor is None:
            continue
        taken = memory(tensor)
        for out, span in zip(outs, spans, strict=True):
            if overlap(span, taken) and not (i < in_place and same(out, tensor)):
                raise ValueError("out: overlaps the memory of an input")


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last; (0, 0) where there are none."""
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    if not plain or tensor.is_meta or tensor.layout != torch.strided or not tensor.nbytes:
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two ranges of addresses have one in common."""
    return a[0] < b[1] and b[0] < a[1]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether each element of a lies where b's does; a is contiguous."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.dtype == b.dtype
        and b.is_contiguous()
    )


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record this call."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop, not any(): a generator costs more than all the rest
            if getattr(tensor, "requires_grad", False):  # what is no tensor is for the checks
                return True
    return False


def differentiated_again() -> bool:
    """Whether a backward pass must itself be differentiable: `gradients` then stands in for it.

    By reverse mode (create_graph=True, torch.func), or by forward mode, where a raw op would lose
    the tangents.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def gradients(
    reference: Callable[..., Any], tensors: Sequence[torch.Tensor | None], gradient: Any
) -> list[torch.Tensor | None]:
    """Gradients of the definition for each floating tensor; differentiable in turn.

    Kernels' backward passes hand over to it when a gradient of the gradient is wanted. Each tensor
    counts as an input of its own, even if it is another one or was computed from another one
    (attention(x, x, x)): autograd adds up what goes through both.
    """
    wanted = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def of_wanted(*inputs: torch.Tensor) -> Any:
        every = list(tensors)
        for i, tensor in zip(wanted, inputs, strict=True):
            every[i] = tensor
        return reference(*every)

    found: list[torch.Tensor | None] = [None] * len(tensors)
    with torch.enable_grad():
        inputs: list[Any] = [tensors[i] for i in wanted]
        pull = torch.func.vjp(of_wanted, *inputs)[1]
        for i, tensor in zip(wanted, pull(gradient), strict=True):
            found[i] = tensor
    return found


def written(*outs: torch.Tensor) -> None:
    """Tells autograd that a kernel wrote into these, as torch's in-place ops do."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(outs)


def into(out: torch.Tensor, kernel: Candidate, *args: Any) -> torch.Tensor:
    """kernel.forward(*args) written into `out`, without a fresh tensor where the kernel can."""
    if kernel.into is None:
        return out.copy_(kernel.forward(*args))
    kernel.into(*args, out)
    written(out)
    return out


def into_pair(
    out: tuple[torch.Tensor, torch.Tensor], kernel: Candidate, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a kernel with two results; its `into` takes both behind the arguments."""
    if kernel.into is None:
        for tensor, result in zip(out, kernel.forward(*args), strict=True):
            tensor.copy_(result)
    else:
        kernel.into(*args, *out)
        written(*out)
    return out


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch's own matrix products take them: inside torch.autocast in its dtype.

    As there, float64 and integers stay, and so does what is no tensor.
    """
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = next((t for t in tensors if isinstance(t, torch.Tensor)), None)
    if first is None:
        return tensors
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in FLOATS[:3] else t for t in tensors
    )


def without_autocast(definition: Callable[P, R]) -> Callable[P, R]:
    """A definition whose own products stay in the dtype that it says, inside torch.autocast too.

    (Its arguments are as `autocast` makes them; the first is a tensor.)
    """

    @functools.wraps(definition)
    def defined(*args: P.args, **options: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        if not torch._C._is_any_autocast_enabled() or first.device.type == "meta":
            return definition(*args, **options)
        with torch.autocast(first.device.type, enabled=False):
            return definition(*args, **options)

    return defined


def is_known(tensor: torch.Tensor) -> bool:
    """Whether the tensor's values can be asked for free.

    Not on an accelerator (asking would wait for it), in compilation, or where the tensor has no
    values of its own (fake, meta, torch.func).
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
    )


def tensor_key(tensor: torch.Tensor | None) -> Any:
    """What checks and choices may depend on in a tensor."""
    if tensor is None:
        return None
    return (tensor.shape, tensor.dtype, tensor.device, tensor.layout)


def types_key(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The types of values and of what tuples among them hold: 1, 1.0 and True are equal as keys."""
    return tuple([types_key(v) if isinstance(v, tuple) else type(v) for v in values])


def call_key(tensors: Sequence[Any], *rest: Any) -> Any:
    """The key of a call: its tensors' shapes, dtypes, devices, and `rest` with its types.

    None when one of them is no tensor.
    """
    key: list[Any] = [*rest, *types_key(rest)] if rest else []
    try:
        for t in tensors:
            key += (None,) if t is None else (t.shape, t.dtype, t.device, t.layout)
    except AttributeError:
        return None
    return tuple(key)


def row_key(x: torch.Tensor, *parameters: torch.Tensor | None, eps: Any = 0.0) -> Any:
    """What checks and choices of a row-wise op depend on; None where there is no tensor or axis."""
    try:
        return (
            eps,
            type(eps),
            x.dtype,
            x.device,
            x.layout,
            x.shape[-1],
            *[p if p is None else (p.shape, p.dtype, p.device, p.layout) for p in parameters],
        )
    except (AttributeError, IndexError):
        return None


class KernelFunction(torch.autograd.Function):
    """Base of the contracts' gradients. `record(*args)` is `apply` without its cost.

    torch's apply binds the arguments to forward's signature at every call (22 of 30 microseconds on
    a tiny tensor); outside of functorch transforms and compilation nothing needs that.
    """

    generate_vmap_rule = True

    @classmethod
    def record(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        base: Any = super(torch.autograd.Function, cls)  # in C, unknown to type checkers
        return base.apply(*args)


CUDA_ROW, CUDA_ROW_BACKWARD = 16384, 8192
"""Elements of a row that csrc/cuda/row.cuh holds in registers: one row at a time, and with sums for
a gradient of parameters beside it."""


def refuses_cuda_rows(
    x: torch.Tensor, *tensors: torch.Tensor | None, limit: int = CUDA_ROW_BACKWARD
) -> list[str]:
    """Why the CUDA kernels that hold a row in registers can't take x and these others.

    Whether a gradient is wanted is no part of a row's key, so the narrower limit stands for both.
    """
    reasons = native.refuses_kinds(x, *tensors)
    if x.ndim and x.shape[-1] > limit:
        reasons.append(
            f"width {x.shape[-1]}: these kernels hold a row of at most {limit} in registers"
        )
    return reasons
