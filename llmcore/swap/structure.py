"""A row of the table of structures, and how a swap is held against what it takes the place of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.ops import contract
from llmcore.swap.instance import Change, Swapped, become

TOLERANCE = {
    torch.float64: 1e-6,  # kernels accumulate in float32 where the definition isn't forced
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""What a result may differ by, as a share of its largest magnitude: some roundings of its dtype."""

SEED = 0

SCALES = (1.0, 1e-3, 30.0)
"""Inputs of these sizes show a norm's epsilon, and an activation's ends."""

Found = Mapping[str, Any] | None
"""The attributes that a swap needs for a module; None: it is something else."""


@dataclass(frozen=True)
class Structure:
    """A kind of module that has a swap.

    recognise  the attributes that the swap needs for this module; None: it is something else.
               Found from what the module holds, and from what it computes on a small input.
    inputs     a small seeded input, to hold the swap against the module; None: `recognise` has
    gradients  whether gradients are compared too
    options    what the module is called with besides, to be held against
    """

    name: str
    swap: type[Swapped]
    recognise: Callable[[nn.Module], Mapping[str, Any] | None]
    inputs: Callable[[nn.Module], tuple[Tensor, ...]] | None
    gradients: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


class Refusal(Exception):
    """Why a module that has a structure of the table keeps its own forward."""

    def __init__(self, structure: str, reason: str) -> None:
        super().__init__(f"{structure}: {reason}")
        self.structure, self.reason = structure, reason


def untouchable(module: nn.Module) -> str:
    """Why this module's forward must stay its own; empty when it need not."""
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a call of its own"
    for name, parameter in module.named_parameters(recurse=False):
        plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if not plain or parameter.layout != torch.strided:
            return f"{name} is a {type(parameter.data).__name__}, no plain parameter"
        if parameter.is_meta:
            return f"{name} has no values yet (meta device)"
        if parameter.dtype not in contract.FLOATS:
            return f"{name} is {parameter.dtype}"
    return ""


def apply(structure: Structure, module: nn.Module) -> tuple[Change, float] | None:
    """Swap the module if it has this structure; the change and the error it was seen to make.

    Refusal when it gives something else than before. `untouchable` has been asked.
    """
    attributes = recognised(structure, module)
    if attributes is None:
        return None
    if structure.inputs is None:
        return become(module, structure.swap, **attributes), 0.0
    # Of weights that were made in inference mode nobody can have gradients.
    gradients = structure.gradients and not any(p.is_inference() for p in module.parameters())
    call = (structure.inputs(module), structure.options, gradients)
    expected = results(module, *call)
    change = become(module, structure.swap, **attributes)
    try:
        error = difference(results(module, *call), expected)
    except (RuntimeError, TypeError, ValueError) as problem:
        change.undo()
        raise Refusal(structure.name, f"the swap failed on a small input: {problem}") from problem
    if not error <= 1.0:
        change.undo()
        raise Refusal(structure.name, f"{error:.1f} times what rounding explains")
    return change, error * tolerance(expected)


def recognised(structure: Structure, module: nn.Module) -> Mapping[str, Any] | None:
    """What `recognise` finds; a module that can't take its small input is something else."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        try:
            return structure.recognise(module)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
            return None


def draw(*shape: int, like: Tensor | None = None, seed: int = SEED) -> Tensor:
    """A seeded normal tensor, of `like`'s dtype and device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values if like is None else values.to(like.device, like.dtype)


def results(
    module: nn.Module, inputs: Sequence[Tensor], options: Mapping[str, Any], gradients: bool
) -> list[Tensor]:
    """What the module gives for these inputs, and the gradients of its inputs and parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        with torch.no_grad():
            plain = list(tensors_of(module(*inputs, **options)))
        if not gradients:
            return plain
        torch.manual_seed(SEED)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
            outputs = [y for y in tensors_of(module(*leaves, **options)) if y.requires_grad]
            wanted = [x for x in leaves if x.requires_grad]
            wanted += [p for p in module.parameters() if p.requires_grad]
            weights = [draw(*y.shape, like=y, seed=1) for y in outputs]
            found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        return plain + [g for g in found if g is not None]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The floating tensors in a module's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def tolerance(expected: Sequence[Tensor]) -> float:
    """Of the narrowest dtype among the results."""
    return max((TOLERANCE[t.dtype] for t in expected), default=TOLERANCE[torch.float32])


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference in units of what is allowed; infinite where they don't correspond."""
    if len(got) != len(expected):
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return float("inf")
        worst = max(worst, relative(ours, theirs) / TOLERANCE[theirs.dtype])
    return worst


def largest(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `relative` of them."""
    return max(map(relative, got, expected), default=0.0)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| / max|theirs|, 0 where both are 0; NaN counts as infinite."""
    if theirs.numel() == 0:
        return 0.0
    error = (ours.double() - theirs.double()).abs().amax().item()
    scale = theirs.double().abs().amax().item()
    if error != error:
        return float("inf")
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def agrees(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    return difference([ours], [theirs]) <= 1.0


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether its forward has one argument that must be given, and none that may be."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.POSITIONAL_ONLY,
    )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that are the module's own."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
