"""One object becomes an instance of a subclass of its own class, and goes back.

Nothing else changes: neither its class, nor the class's module, nor its parameters or hooks. The
subclass has the name of the class, for those who ask an object for it, and is made once for each
pair of a swap and a class. It can't be imported by that name, so a pickled object says how to make
its class anew. So copies, pickles, `torch.save` and worker processes see the same object.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.ops import contract


class Swapped:
    """Base of what a module of another library turns into; stands before the module's own class."""

    _llmcore_made_of: tuple[type[Swapped], type[nn.Module]]
    _llmcore_held: tuple[str, ...]  # its parameters' names when it was swapped

    @classmethod
    def members(cls, original: type[nn.Module]) -> Mapping[str, Any]:
        """What the subclass of this very class has beyond the swap's own methods."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        plain = isinstance(made, tuple) and made[0] is vars(copyreg)["__newobj__"]
        if plain and made[1] == (type(self),):
            return (empty, made_of(type(self)), *made[2:])
        return made


@functools.cache
def subclass(swap: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The class of an `original` that has been swapped; one for each pair."""
    members = {
        "_llmcore_made_of": (swap, original),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **swap.members(original),
    }
    return type(original.__name__, (swap, original), members)


def made_of(made: type[Any]) -> tuple[Any, ...]:
    """The swaps of a class, the last one first, and behind them the class that was there."""
    swap, original = made._llmcore_made_of
    return (swap, *(made_of(original) if issubclass(original, Swapped) else (original,)))


def empty(*parts: Any) -> Any:
    """An object of the class of these swaps, its state still to come: for pickles and copies."""
    *swaps, made = parts
    for swap in reversed(swaps):
        made = subclass(swap, made)
    return made.__new__(made)


@dataclass(frozen=True)
class Change:
    """A module, the class that it had, and the attributes that it was given."""

    module: nn.Module
    original: type[nn.Module]
    attributes: tuple[str, ...]

    def undo(self) -> None:
        """RuntimeError when something else has changed the class since."""
        now = type(self.module)
        if getattr(now, "_llmcore_made_of", (None, None))[1] is not self.original:
            raise RuntimeError(
                f"undo: a {self.original.__name__} has become a {now.__name__} of "
                f"{now.__module__} since; undo that first"
            )
        self.module.__class__ = self.original
        for name in self.attributes:
            self.module.__dict__.pop(name, None)


def become(module: nn.Module, swap: type[Swapped], **attributes: Any) -> Change:
    """Make the module a `swap` with these attributes beside its own."""
    original = type(module)
    attributes["_llmcore_held"] = tuple(module._parameters)
    module.__class__ = subclass(swap, original)  # type: ignore[arg-type]  # classes are hashable
    module.__dict__.update(attributes)
    return Change(module, original, tuple(attributes))


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def has_its_parameters(module: Any) -> bool:
    """Whether they are where they were: pruning, weight norm and FSDP keep them elsewhere.

    The module's own forward asks for the attributes, whatever is behind them.
    """
    return all(name in module._parameters for name in module._llmcore_held)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see or change this module's calls."""
    return any(getattr(module, name) for name in HOOKS)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No module's hooks run: they are for the model's calls, not for ours on small inputs."""
    kept = [(m, name, m.__dict__[name]) for m in model.modules() for name in HOOKS]
    for module, name, hooks in kept:
        module.__dict__[name] = type(hooks)()
    try:
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks


class OneTensor(Swapped):
    """A swap of a module whose forward takes one tensor."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or not self._takes(inputs[0]):
            return super().forward(*inputs, **named)  # type: ignore[misc]
        return self._compute(inputs[0])

    def _takes(self, x: Any) -> bool:
        """Whether the kernels have this call: parameters may have been cast since."""
        weight = self._parameters.get("weight")  # type: ignore[attr-defined]
        return (
            isinstance(x, Tensor)
            and x.dtype in contract.FLOATS
            and has_its_parameters(self)
            and (weight is None or weight.dtype in (x.dtype, torch.float32))
        )

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError
