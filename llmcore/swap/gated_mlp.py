"""Gated feed-forward networks, by what their linears compute together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llmcore import ops
from llmcore.ops import contract
from llmcore.swap.activations import ACTIVATIONS
from llmcore.swap.instance import OneTensor
from llmcore.swap.linears import columns, is_linear, outputs
from llmcore.swap.structure import Found, agrees, draw, own_tensors, takes_one_tensor


class GatedMLP(OneTensor):
    """down(act(gate x) * up x); gate and up may be one linear, in either order."""

    _llmcore_roles: tuple[str, str | None, str]  # gate (or both), up, down: names of children
    _llmcore_activation: str
    _llmcore_gate_first: bool

    def _takes(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype in contract.FLOATS

    def _compute(self, x: Tensor) -> Tensor:
        children = self._modules  # type: ignore[attr-defined]
        gate_name, up_name, down = self._llmcore_roles
        if up_name is None:
            halves = children[gate_name](x).chunk(2, dim=-1)
            gate, up = halves if self._llmcore_gate_first else reversed(halves)
        else:
            gate, up = children[gate_name](x), children[up_name](x)
        return children[down](gated(gate, up, self._llmcore_activation))


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return ops.swiglu(gate, up)
    return ops.geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")


def gated_mlp(module: nn.Module) -> Found:
    if own_tensors(module) or not takes_one_tensor(module):
        return None
    linears = {n: m for n, m in module.named_children() if is_linear(m)}
    others = [m for m in module.children() if not is_linear(m)]
    if len(linears) not in (2, 3) or len(others) > 1:
        return None
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in others):
        return None
    for roles, first in _roles(linears):
        x = draw(2, 3, columns(linears[roles[0]]), like=next(module.parameters()))
        y = module(x)
        for activation in ACTIVATIONS:
            found = {
                "_llmcore_roles": roles,
                "_llmcore_activation": activation,
                "_llmcore_gate_first": first,
            }
            if agrees(_gated_definition(linears, found, x), y):
                return found
    return None


def _roles(linears: Mapping[str, nn.Module]) -> Iterator[tuple[tuple[str, str | None, str], bool]]:
    """Who may be gate, up and down, by their shapes; and whether the gate is the first half."""
    for names in itertools.permutations(linears):
        shapes = [(outputs(linears[name]), columns(linears[name])) for name in names]
        if len(names) == 3 and shapes[0] == shapes[1] and shapes[2][1] == shapes[0][0]:
            yield (names[0], names[1], names[2]), True
        if len(names) == 2 and shapes[0][0] == 2 * shapes[1][1]:
            yield (names[0], None, names[1]), True
            yield (names[0], None, names[1]), False


def _gated_definition(
    linears: Mapping[str, nn.Module], found: Mapping[str, Any], x: Tensor
) -> Tensor:
    gate_name, up_name, down = found["_llmcore_roles"]
    if up_name is None:
        gate, up = linears[gate_name](x).chunk(2, dim=-1)
        if not found["_llmcore_gate_first"]:
            gate, up = up, gate
    else:
        gate, up = linears[gate_name](x), linears[up_name](x)
    y: Tensor = linears[down](ACTIVATIONS[found["_llmcore_activation"]](gate) * up)
    return y


def gated_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    first, _, _ = gated_roles(module)
    return (draw(2, 3, columns(first), like=next(module.parameters())),)


def gated_roles(module: nn.Module) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    found = gated_mlp(module)
    assert found is not None
    gate, up, down = found["_llmcore_roles"]
    children = module._modules
    return children[gate], children.get(up), children[down]  # type: ignore[return-value]
