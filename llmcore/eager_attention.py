"""What a Hugging Face layer's own eager attention function does beyond attention.

Every model of transformers brings a function, mostly named eager_attention_forward, that defines
its attention: softmax(scaling * q k^T + mask) v, here and there with something else. `calls_for`
reads that function's source once for a class of layers and says whether the kernels do all of it
in a call. No model is known by name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

USUAL = ("query", "key", "value", "attention_mask", "scaling", "dropout", "sliding_window")
"""What these functions take that says no more than their arguments and the mask do."""

RUN = ("softcap", "position_bias", "s_aux", "is_causal")
"""What `attend` runs besides."""

READ = ("num_key_value_groups", "training", "head_dim", "sinks")
"""What they may read of the layer for that."""

CALLED = (
    *("repeat_kv", "matmul", "softmax", "dropout", "transpose", "contiguous", "to", "type"),
    *("size", "float", "reshape", "view", "expand", "unsqueeze", "cat", "max", "tanh"),
    *("sigmoid", "logsumexp", "maybe_autocast", "getattr", "hasattr"),
)
"""What they call for that."""

HARMLESS = (
    *("output_attentions", "output_hidden_states", "output_router_logits", "use_cache"),
    *("position_ids", "cache_position", "num_items_in_batch", "logits_to_keep", "return_dict"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"),
)
"""Arguments that change no result, for a layer that has no such function to ask."""

PAGED = ("cache", "read_index")
"""Arguments by which a paged cache shows: itself, before transformers 5.24, and its places."""

Function = Callable[..., Any]


class Facts(NamedTuple):
    """Of the eager function of a class of layers; strings and numbers only, for torch.compile.

    found: there is one.  taken: arguments of its own that change the result and are not run.
    strange: it does something that is not known here.  has_sinks: it reads the layer's sinks.
    """

    found: bool
    taken: tuple[str, ...]
    strange: bool
    has_sinks: bool


def calls_for(module: torch.nn.Module, arguments: dict[str, Any]) -> Function | None:
    """The layer's eager function where it must run this call, None where the kernels can.

    Raises:
        TypeError: an argument that nothing knows, of a layer without an eager function.
        ValueError: a paged cache, which only transformers' own functions fill.
    """
    found, taken, strange, has_sinks = facts(type(module))
    wanted = strange or (
        has_sinks and arguments.get("s_aux") is None and getattr(module, "sinks", None) is not None
    )
    for name, value in arguments.items():
        if value is None or value is False or name in RUN or name in HARMLESS[1:]:
            continue
        if name in PAGED:
            raise ValueError(f'{name}: a paged cache needs attn_implementation="sdpa"')
        if name == "output_attentions" or name in taken:
            wanted = True
        elif not found and name not in USUAL:
            raise TypeError(
                f"{name}: not known to llmcore, and {type(module).__name__} has no eager attention "
                "function that could run it"
            )
    layer: Any = type(module)
    return function_of(layer) if wanted and found else None


@torch.compiler.assume_constant_result
def facts(layer: type) -> tuple[bool, tuple[str, ...], bool, bool]:
    """`read` of a class of layers, once."""
    return tuple(read(layer))  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def function_of(layer: type) -> Function | None:
    """The eager attention function that a class of layers uses, or None.

    Its forward names it; a subclass with another forward has its base's.
    """
    for base in layer.__mro__:
        forward = inspect.unwrap(base.__dict__.get("forward", read))
        for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            if name.endswith("eager_attention_forward"):
                return getattr(forward, "__globals__", {}).get(name)
    homes = (sys.modules.get(base.__module__) for base in layer.__mro__)
    functions = (getattr(home, "eager_attention_forward", None) for home in homes)
    return next(filter(None, functions), None)


@functools.lru_cache(maxsize=1024)
def read(layer: type) -> Facts:
    """What the eager function of a class of layers takes, reads and calls."""
    function = function_of(layer)
    if function is None:
        return Facts(False, (), False, False)
    taken = tuple(
        name
        for name in tuple(inspect.signature(function).parameters)[1:]
        if name not in USUAL and name not in RUN and name != "kwargs"
    )
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # made in a prompt, or compiled: nobody knows what it does
        return Facts(True, taken, True, False)
    body = ast.parse(source).body[0]
    attributes = attributes_read(body, next(iter(inspect.signature(function).parameters)))
    strange = not attributes <= set(READ) or not called(body) <= set(CALLED)
    return Facts(True, taken, strange or reads_kwargs(body), "sinks" in attributes)


def attributes_read(body: ast.AST, name: str) -> set[str]:
    """The attributes that a function reads of the argument `name`; "?" for other uses of it."""
    found, explained = set(), set()
    for node in ast.walk(body):
        if isinstance(node, ast.Attribute) and is_name(node.value, name):
            found.add(node.attr)
            explained.add(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            first, second = node.args[:2]
            if is_name(first, name) and isinstance(second, ast.Constant):
                found.add(str(second.value))
                explained.add(first)
    uses = {node for node in ast.walk(body) if is_name(node, name)}
    return found if uses == explained else found | {"?"}


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def called(body: ast.AST) -> set[str]:
    """The last names of all that a function calls."""
    calls = (node.func for node in ast.walk(body) if isinstance(node, ast.Call))
    return {
        call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "?") for call in calls
    }


def reads_kwargs(body: ast.AST) -> bool:
    """Whether a function looks into its **kwargs."""
    rest = getattr(getattr(body, "args", None), "kwarg", None)
    return rest is not None and any(is_name(node, rest.arg) for node in ast.walk(body))
