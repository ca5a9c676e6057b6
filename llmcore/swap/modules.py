"""Norms, activations, linears, gated networks and losses: recognised by what they compute.

A `recognise` looks at what a module holds (its parameters' shapes, its children, the arguments of
its forward) and then asks it: the module's result on a small seeded input must be that of one of
the formulas here. Names of classes and of attributes don't count, but for where an epsilon is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops import contract
from llmcore.ops.packed_weight import PackedWeight, pack
from llmcore.swap.instance import Swapped
from llmcore.swap.structure import Structure, agrees, draw, own_tensors, takes_one_tensor

Found = Mapping[str, Any] | None

SCALES = (1.0, 1e-3, 30.0)
"""Inputs of these sizes show a norm's epsilon, and an activation's ends."""


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
            and (weight is None or weight.dtype in (x.dtype, torch.float32))
        )

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# Norms


class RMSNorm(OneTensor):
    """x / rms(x) * weight, or * (1 + weight)."""

    _llmcore_eps: float
    _llmcore_plus_one: bool

    def _compute(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")  # type: ignore[attr-defined]
        if self._llmcore_plus_one:
            weight = 1.0 + weight.float()
        return ops.rms_norm(x, weight, self._llmcore_eps)


def rms_norm(module: nn.Module) -> Found:
    tensors = own_tensors(module)
    if [*module.children()] or not takes_one_tensor(module) or set(tensors) - {"weight"}:
        return None
    weight = tensors.get("weight")
    width = _width(module, weight)
    if width is None:
        return None
    for eps, plus_one in itertools.product(_epsilons(module), (False, True)):
        if plus_one and weight is None:
            continue
        scale = 1.0 + weight.float() if plus_one and weight is not None else weight

        def formula(x: Tensor, scale: Tensor | None = scale, eps: float = eps) -> Tensor:
            y = F.rms_norm(x.float(), (width,), None, eps)
            return (y if scale is None else y * scale.float()).to(x.dtype)

        if _computes(module, formula, width, weight):
            return {"_llmcore_eps": eps, "_llmcore_plus_one": plus_one}
    return None


class LayerNorm(OneTensor):
    """(x - mean) / std * weight + bias."""

    _llmcore_eps: float

    def _compute(self, x: Tensor) -> Tensor:
        parameters = self._parameters  # type: ignore[attr-defined]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        return ops.layer_norm(x, weight, bias, self._llmcore_eps)


def layer_norm(module: nn.Module) -> Found:
    tensors = own_tensors(module)
    if [*module.children()] or not takes_one_tensor(module) or set(tensors) - {"weight", "bias"}:
        return None
    weight, bias = tensors.get("weight"), tensors.get("bias")
    width = _width(module, weight)
    if width is None or (bias is not None and bias.shape != (width,)):
        return None
    for eps in _epsilons(module):

        def formula(x: Tensor, eps: float = eps) -> Tensor:
            return F.layer_norm(x.float(), (width,), _wide(weight), _wide(bias), eps).to(x.dtype)

        if _computes(module, formula, width, weight):
            return {"_llmcore_eps": eps}
    return None


def _width(module: nn.Module, weight: Tensor | None) -> int | None:
    """The length of the last axis that a norm takes; None where nothing says it."""
    if weight is not None:
        return weight.shape[0] if weight.ndim == 1 and weight.numel() > 1 else None
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 and shape[0] > 1 else None


def _epsilons(module: nn.Module) -> Iterator[float]:
    """Small numbers that the module holds, and torch's own default."""
    held = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2]
    yield from dict.fromkeys([*held, torch.finfo(torch.float32).eps])


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _computes(
    module: nn.Module, formula: Callable[[Tensor], Tensor], width: int, like: Tensor | None
) -> bool:
    """Whether the module computes this formula on (2, 3, width) of every size in SCALES."""
    x = draw(2, 3, width, like=like)
    return all(agrees(module(x * scale), formula(x * scale)) for scale in SCALES)


def rows_of(module: nn.Module) -> tuple[Tensor, ...]:
    """A small input of a module whose first parameter tells the width."""
    weight = next(module.parameters(), None)
    width = _width(module, weight)
    assert width is not None
    return (draw(2, 3, width, like=weight),)


# Activations


class Gelu(OneTensor):
    """x Phi(x), exactly or by tanh."""

    _llmcore_approximate: str

    def _compute(self, x: Tensor) -> Tensor:
        return ops.gelu(x, self._llmcore_approximate)


def gelu(module: nn.Module) -> Found:
    name = activation_of(module)
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}.get(name or "")
    return None if approximate is None else {"_llmcore_approximate": approximate}


def activation_of(module: nn.Module) -> str | None:
    """The activation that a module without parameters, or a function, is; None: another one."""
    if isinstance(module, nn.Module) and (
        own_tensors(module) or [*module.children()] or not takes_one_tensor(module)
    ):
        return None
    x = torch.cat([draw(4, 32) * scale for scale in SCALES])
    y = module(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, formula in ACTIVATIONS.items():
        # Absolutely: the formulas differ by 5e-4 where their values are small.
        if (formula(x) - y).abs().amax() <= 2e-5:
            return name
    return None


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


# Linears


class Linear(Swapped):
    """x Wᵀ + b, where the kernels are the faster: at inference, and with a packed weight."""

    _llmcore_packed: PackedWeight | None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1:
            return super().forward(*inputs, **named)  # type: ignore[misc]
        (x,) = inputs
        parameters = self._parameters  # type: ignore[attr-defined]
        weight, bias = parameters["weight"], parameters.get("bias")
        if self._llmcore_packed is not None:
            return ops.linear(x, self._llmcore_packed, bias)
        # torch's product is as fast on many rows, and its gradient is a little faster than ours.
        if contract.wants_gradient(x, weight, bias) or x.dtype != weight.dtype:
            return super().forward(x)  # type: ignore[misc]
        return ops.linear(x, weight, bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        pack_anew(self)


def pack_anew(module: Any) -> None:
    """Pack a packed linear's weight again, as it was packed: it has other values now."""
    packed = module._llmcore_packed
    if packed is not None:
        weight = module._parameters["weight"].detach()
        rows = weight.T if isinstance(module, PackedColumns) else weight
        options = {"asymmetric": True} if packed.minimums is not None else {}
        groups = (packed.group,) if packed.group else ()
        module.__dict__["_llmcore_packed"] = pack(rows, packed.format, *groups, **options)


def linear(module: nn.Module) -> Found:
    return {"_llmcore_packed": None} if linear_layout(module) == "rows" else None


def linear_layout(module: nn.Module) -> str | None:
    """ "rows" for a weight (N, K), "columns" for (K, N); None for what is no linear."""
    tensors = own_tensors(module)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if [*module.children()] or set(tensors) - {"weight", "bias"} or not takes_one_tensor(module):
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    for layout, matrix in (("rows", weight), ("columns", weight.T)):
        if bias is not None and bias.shape != matrix.shape[:1]:
            continue
        x = draw(2, 3, matrix.shape[1], like=weight)
        try:
            if agrees(module(x), F.linear(x, matrix, bias)):
                return layout
        except (RuntimeError, IndexError, TypeError):
            continue
    return None


def linear_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (draw(2, 3, weight.shape[0 if linear_layout(module) == "columns" else 1], like=weight),)


# Gated feed-forward networks


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
    linears = {n: m for n, m in module.named_children() if _is_linear(m)}
    others = [m for m in module.children() if not _is_linear(m)]
    if len(linears) not in (2, 3) or len(others) > 1:
        return None
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in others):
        return None
    for roles, first in _roles(linears):
        x = draw(2, 3, _columns(linears[roles[0]]), like=next(module.parameters()))
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
        shapes = [(_outputs(linears[name]), _columns(linears[name])) for name in names]
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


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Linear | PackedColumns) or linear_layout(module) is not None


def _columns(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if isinstance(module, PackedColumns) else 1]


def _outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if isinstance(module, PackedColumns) else 0]


def gated_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    first, _, _ = gated_roles(module)
    return (draw(2, 3, _columns(first), like=next(module.parameters())),)


def gated_roles(module: nn.Module) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    found = gated_mlp(module)
    assert found is not None
    gate, up, down = found["_llmcore_roles"]
    children = module._modules
    return children[gate], children.get(up), children[down]  # type: ignore[return-value]


# A residual and its norm: LayerNorm(linear(x) + residual)


class AddedNorm(Swapped):
    """norm(dropout(linear(x)) + residual), the sum and the norm in one pass."""

    _llmcore_linear: str
    _llmcore_norm: str
    _llmcore_dropout: str | None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        children = self._modules  # type: ignore[attr-defined]
        norm = children[self._llmcore_norm]
        if named or len(inputs) != 2 or has_hooks(norm) or not isinstance(norm, LayerNorm):
            return super().forward(*inputs, **named)  # type: ignore[misc]
        x, residual = inputs
        branch = children[self._llmcore_linear](x)
        if self._llmcore_dropout is not None:
            branch = children[self._llmcore_dropout](branch)
        if not norm._takes(branch) or branch.dtype != residual.dtype:
            return norm(branch + residual)  # type: ignore[operator]
        weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")  # type: ignore[attr-defined]
        return ops.add_layer_norm(branch, residual, weight, bias, norm._llmcore_eps)[0]


def added_norm(module: nn.Module) -> Found:
    children = dict(module.named_children())
    norms = [n for n, m in children.items() if isinstance(m, LayerNorm)]
    linears = [n for n, m in children.items() if _is_linear(m)]
    dropouts = [n for n, m in children.items() if isinstance(m, nn.Dropout)]
    if (len(norms), len(linears)) != (1, 1) or len(children) != 2 + len(dropouts):
        return None
    if own_tensors(module) or len(dropouts) > 1:
        return None
    x, residual = added_inputs(module)
    found = {
        "_llmcore_linear": linears[0],
        "_llmcore_norm": norms[0],
        "_llmcore_dropout": dropouts[0] if dropouts else None,
    }
    torch.manual_seed(0)  # the same dropout in both
    y = module(x, residual)
    torch.manual_seed(0)
    branch = children[linears[0]](x)
    if dropouts:
        branch = children[dropouts[0]](branch)
    return found if agrees(children[norms[0]](branch + residual), y) else None


def added_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    linear = next(m for m in module.children() if _is_linear(m))
    like = next(module.parameters())
    columns, outputs = _columns(linear), _outputs(linear)
    return draw(2, 3, columns, like=like), draw(2, 3, outputs, like=like, seed=2)


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see or change this module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# A weight (K, N), as transformers' Conv1D has: only packed, for torch's product is as fast


class PackedColumns(OneTensor):
    """x W + b with W packed; left alone otherwise."""

    _llmcore_packed: PackedWeight

    def _takes(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype in contract.FLOATS

    def _compute(self, x: Tensor) -> Tensor:
        return ops.linear(x, self._llmcore_packed, self._parameters.get("bias"))  # type: ignore[attr-defined]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        pack_anew(self)


# Losses


class CrossEntropy(Swapped):
    """nn.CrossEntropyLoss with class numbers as targets and no class weights."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 2 or not self._takes(*inputs):
            return super().forward(*inputs, **named)  # type: ignore[misc]
        logits, target = inputs
        if logits.ndim > 2:
            logits = logits.movedim(1, -1)
        return ops.cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,  # type: ignore[attr-defined]
            label_smoothing=self.label_smoothing,  # type: ignore[attr-defined]
            reduction=self.reduction,  # type: ignore[attr-defined]
        )

    def _takes(self, logits: Any, target: Any) -> bool:
        return (
            isinstance(logits, Tensor)
            and isinstance(target, Tensor)
            and self.weight is None  # type: ignore[attr-defined]
            and logits.dtype in contract.FLOATS
            and target.dtype == torch.int64
            and not torch.is_autocast_enabled(logits.device.type)  # torch's gives float32 there
            and logits.ndim == target.ndim + 1
        )


def cross_entropy(module: nn.Module) -> Found:
    return {} if isinstance(module, nn.CrossEntropyLoss) and module.weight is None else None


def loss_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    return draw(6, 11), torch.arange(6)


STRUCTURES = (
    Structure("rms_norm", RMSNorm, rms_norm, rows_of),
    Structure("layer_norm", LayerNorm, layer_norm, rows_of),
    Structure("gelu", Gelu, gelu, lambda module: (draw(3, 64),)),
    Structure("linear", Linear, linear, linear_inputs, gradients=False),
    Structure("gated_mlp", GatedMLP, gated_mlp, gated_inputs),
    Structure("add_layer_norm", AddedNorm, added_norm, added_inputs),
    Structure("cross_entropy", CrossEntropy, cross_entropy, loss_inputs),
)
"""The table, best first; a module gets the first that fits, after its children got theirs."""
