"""Attention and rotary positions inside models of Hugging Face transformers.

Their layers ask a table for the attention function that their config names, and call a function of
their own module to rotate queries and keys. This model gets a config of its own, which names
llmcore's; and a layer whose forward calls such a function gets a forward of the same code that
finds ours in its place. Neither config nor function of other models changes.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from llmcore import attention_interface, ops
from llmcore.swap.instance import Swapped
from llmcore.swap.structure import Structure, agrees, draw


def is_of_transformers(model: nn.Module) -> bool:
    """Whether its class says if an attention function may be chosen, as those of transformers."""
    return callable(getattr(type(model), "_can_set_attn_implementation", None))


@dataclass
class OwnConfig:
    """A model's configs, copied so that only this model has them; the way back.

    places  (module, attribute, the config that was there)
    """

    places: list[tuple[nn.Module, str, Any]]

    @classmethod
    def choose(
        cls, model: nn.Module, around: nn.Module, others: Iterable[nn.Module] = ()
    ) -> OwnConfig:
        """Give the model a config of its own that names llmcore's attention.

        Where what is `around` it has that config too, it gets the same one, but for `others`,
        models that choose for themselves.
        ValueError where its class has no choice of attention functions, or its attention is one
        that was asked for by name ("flex_attention", ...).
        """
        own: Any = model
        if not type(own)._can_set_attn_implementation():
            raise ValueError("its class has no choice of attention functions")
        chosen = own.config._attn_implementation
        if chosen not in ("sdpa", "eager", None):
            raise ValueError(f"attn_implementation {chosen!r} was chosen for this model")
        attention_interface.register()
        copies: dict[int, Any] = {}
        own_configs = {id(config) for _, _, config in configs_in(model)}
        modules = set(model.modules())
        foreign = {module for other in others for module in other.modules()} - modules
        places = [
            place
            for place in configs_in(around)
            if id(place[2]) in own_configs and place[0] not in foreign
        ]
        for _, _, config in places:
            copy.deepcopy(config, copies)  # sub-configs too, each once
        for module, name, config in places:
            own = copies[id(config)]
            if own._attn_implementation in ("sdpa", "eager"):
                own._attn_implementation = attention_interface.NAME
            setattr(module, name, own)
        return cls(places)

    def undo(self) -> None:
        """The configs as they were; what has been set in the copies since is set in them."""
        for module, name, config in self.places:
            own = vars(module).get(name)
            if own is config or own is None:
                continue
            for key, value in vars(own).items():
                if key != "_attn_implementation_internal" and key in vars(config):
                    _set_if_plain(config, key, value)
            setattr(module, name, config)


def configs_in(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Where its modules keep configs that name an attention function."""
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(type(value), "_attn_implementation"):
                yield module, name, value


def _set_if_plain(config: Any, key: str, value: Any) -> None:
    """Set what has no sub-configs in it: those are copies with a way back of their own."""
    if isinstance(value, bool | int | float | str | type(None)):
        vars(config)[key] = value


# Rotary positions


class RotaryAttention(Swapped):
    """A layer whose forward rotates queries and keys through `ops.rope`."""

    @classmethod
    def members(cls, original: type[nn.Module]) -> Mapping[str, Any]:
        *decorators, forward = undecorated(original.forward)
        # Without the module's name, by which compilers would look the functions up there.
        names = {k: v for k, v in forward.__globals__.items() if k != "__name__"}
        for name in rotary_functions(forward):
            names[name] = rotary(names[name])
        own = copied(forward, names, forward.__closure__)
        for decorator in reversed(decorators):
            cells = decorator.__closure__ or ()
            inner = decorator.__wrapped__  # type: ignore[attr-defined]
            closure = tuple(CellType(own) if holds(cell, inner) else cell for cell in cells)
            inner, own = own, copied(decorator, decorator.__globals__, closure)
            own.__wrapped__ = inner  # type: ignore[attr-defined]
        return {"forward": own}


def copied(
    function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None
) -> FunctionType:
    """The same code over other globals and another closure."""
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    own.__kwdefaults__ = function.__kwdefaults__
    own.__annotations__, own.__doc__ = function.__annotations__, function.__doc__
    return own


def undecorated(forward: Any) -> list[FunctionType]:
    """A function and those that its decorators wrap, each held by the closure of the one before.

    Empty where one of them is no plain function, or what it calls can't be told.
    """
    found = [forward]
    while (inner := getattr(found[-1], "__wrapped__", None)) is not None:
        if not any(holds(cell, inner) for cell in getattr(found[-1], "__closure__", None) or ()):
            return []
        found.append(inner)
    return found if all(isinstance(function, FunctionType) for function in found) else []


def holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty one
        return False


def rotary_functions(forward: FunctionType) -> list[str]:
    """The global functions that a forward calls to rotate queries and keys."""
    called = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    kinds = (FunctionType, nn.Module)  # a function that is to be replaced may be either
    return [name for name, value in called.items() if isinstance(value, kinds) and rotates(value)]


@functools.cache
def rotates(function: Any) -> bool:
    """Whether it is (q, k, cos, sin) -> both rotated, half by half, cos and sin (B, T, R)."""
    own = function.forward if isinstance(function, nn.Module) else function
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    q, k = draw(2, 4, 3, 8), draw(2, 2, 3, 8, seed=1)
    cos, sin = (draw(2, 3, 4, seed=s).repeat(1, 1, 2) for s in (2, 3))
    try:
        theirs = function(q, k, cos, sin)
        return all(
            agrees(ops.rope(x, cos[..., :4], sin[..., :4]), y)
            for x, y in zip((q, k), theirs, strict=True)
        )
    except (RuntimeError, TypeError, ValueError):
        return False


@functools.cache
def rotary(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same function through `ops.rope`; calls that it has no way for go to theirs."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        width = cos.shape[-1]
        fits = not rest and not options and q.ndim == k.ndim == 4 and cos.ndim == 3
        if not fits or width > q.shape[-1] or width % 2 or _wants_angles(cos, sin):
            return theirs(q, k, cos, sin, *rest, **options)
        half = width // 2
        cos, sin = cos[..., :half], sin[..., :half]
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return ops.rope(q, cos, sin), ops.rope(k, cos, sin)

    return rotate


def _wants_angles(cos: Tensor, sin: Tensor) -> bool:
    return torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)


def rotary_attention(module: nn.Module) -> Mapping[str, Any] | None:
    functions = undecorated(type(module).forward)
    return {} if functions and rotary_functions(functions[-1]) else None


ROPE = Structure("rope", RotaryAttention, rotary_attention, None)
"""Held against what was there by the whole model's output: a layer's arguments are its own."""


# The whole model, on a small input


def small_inputs(model: nn.Module, length: int = 8) -> Iterator[dict[str, Any]]:
    """Arguments of a forward pass, seeded; nothing where nobody says what the model takes.

    For text without padding, and with padding on the left and on the right.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        return
    generator = torch.Generator().manual_seed(0)
    device, dtype = next(((p.device, p.dtype) for p in model.parameters()), ("cpu", torch.float32))
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    tokens = min(getattr(text, "vocab_size", 0) or 0, 1000)

    def ids(length: int) -> Tensor:
        return torch.randint(min(3, tokens - 1), tokens, (2, length), generator=generator).to(
            device
        )

    extra = {}
    if getattr(config, "is_encoder_decoder", False):
        extra["decoder_input_ids"] = ids(length - 2)
    if name == "input_ids" and tokens > 1:
        plain = {"input_ids": ids(length), **extra}
        yield plain
        places = torch.arange(length, device=device)
        short = (places < torch.tensor([[length], [length - 3]], device=device)).long()
        yield {**plain, "attention_mask": short}
        if not extra:
            yield {**plain, "attention_mask": short.flip(-1)}
        return
    shape = _input_shape(name, config)
    if shape is not None:
        values = torch.randn(2, *shape, generator=generator).to(device, dtype)
        yield {name: values, **extra}


def _input_shape(name: str, config: Any) -> tuple[int, ...] | None:
    """Of one picture or one sound, as the config has them."""
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return config.num_channels, config.image_size, config.image_size
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return config.num_mel_bins, 2 * config.max_source_positions
    return None


def outputs(model: nn.Module) -> list[Tensor]:
    """The model's main results on `small_inputs` at inference; none where padding is."""
    found = []
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for arguments in small_inputs(model):
                result = model(**arguments)
                main = next(iter(result.values())) if isinstance(result, Mapping) else result
                if isinstance(main, tuple | list):
                    main = main[0]
                mask = arguments.get("attention_mask")
                if mask is not None and main.shape[:2] == mask.shape:
                    main = main[mask.bool()]
                found.append(main)
    finally:
        for module in training:
            module.training = True
    return found
