"""Linears: a weight of two axes and a bias, one argument, and the product."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops import contract
from llmcore.ops.packed_weight import PackedWeight, pack
from llmcore.swap.instance import OneTensor, Swapped, has_its_parameters
from llmcore.swap.structure import Found, agrees, draw, own_tensors, takes_one_tensor


class Linear(Swapped):
    """x Wᵀ + b, with a weight of x's dtype or a packed one."""

    _llmcore_packed: PackedWeight | None
    _llmcore_sample: Tensor | None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1 or not has_its_parameters(self):
            return super().forward(*inputs, **named)  # type: ignore[misc]
        (x,) = inputs
        parameters = self._parameters  # type: ignore[attr-defined]
        weight, bias = parameters["weight"], parameters.get("bias")
        if self._llmcore_packed is not None:
            return ops.linear(x, up_to_date(self), bias)
        if x.dtype != weight.dtype:
            return super().forward(x)  # type: ignore[misc]
        return ops.linear(x, weight, bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        pack_anew(self)


class PackedColumns(OneTensor):
    """x W + b with W packed; left alone otherwise."""

    _llmcore_packed: PackedWeight
    _llmcore_sample: Tensor

    def _takes(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype in contract.FLOATS and has_its_parameters(self)

    def _compute(self, x: Tensor) -> Tensor:
        return ops.linear(x, up_to_date(self), self._parameters.get("bias"))  # type: ignore[attr-defined]

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
        module.__dict__.update(holding(pack(rows, packed.format, *groups, **options), weight))


def holding(packed: PackedWeight, weight: Tensor) -> dict[str, Any]:
    """What a linear has beside its weight once that is packed."""
    return {"_llmcore_packed": packed, "_llmcore_sample": sample(weight)}


def up_to_date(module: Any) -> PackedWeight:
    """A packed linear's weight; packed anew where its parameter has other values by now.

    As when adapters were merged into it. Some values stand for all, for reading them all would take
    longer than the product. In compilation and tracing nothing is compared: a graph holds the
    weight that it was made with.
    """
    weight = module._parameters["weight"]
    if has_values(weight):
        now = sample(weight)
        kept = module._llmcore_sample.to(now)  # a cast weight is compared with the old one's cast
        if not torch.equal(now.view(torch.uint8), kept.view(torch.uint8)):  # bits: NaN is NaN
            pack_anew(module)
    packed: PackedWeight = module._llmcore_packed
    return packed


def has_values(weight: Tensor) -> bool:
    """Whether they can be looked at: not of what is traced, fake, or batched."""
    return torch._C._len_torch_dispatch_stack() == 0 and contract.is_known(weight.detach())


SAMPLES = 64


def sample(weight: Tensor) -> Tensor:
    """A copy of values from all over a weight, no two of a row or a column if it has so many."""
    return weight.detach().reshape(-1)[places(weight.numel())]


@functools.cache
def places(count: int) -> Tensor:
    """SAMPLES of 0 to count - 1, in steps of the golden section."""
    return (torch.arange(1, SAMPLES + 1).double() * ((5**0.5 - 1) / 2)).frac().mul(count).long()


def linear(module: nn.Module) -> Found:
    attributes = {"_llmcore_packed": None, "_llmcore_sample": None}
    return attributes if linear_layout(module) == "rows" else None


def linear_layout(module: nn.Module) -> str | None:
    """ "rows" for a weight (N, K), "columns" for (K, N); None for what is no linear."""
    tensors = own_tensors(module)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if [*module.children()] or set(tensors) - {"weight", "bias"} or not takes_one_tensor(module):
        return None
    if not all(isinstance(t, nn.Parameter) for t in tensors.values()):
        return None
    if weight is None or weight.ndim != 2:
        return None
    for layout, matrix in (("rows", weight), ("columns", weight.T)):
        if bias is not None and bias.shape != matrix.shape[:1]:
            continue
        x = draw(2, 3, matrix.shape[1], like=weight)
        try:
            if agrees(module(x), F.linear(x, matrix, bias)):
                return layout
        except (RuntimeError, IndexError, TypeError, AttributeError):
            continue
    return None


def linear_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (draw(2, 3, weight.shape[0 if linear_layout(module) == "columns" else 1], like=weight),)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, Linear | PackedColumns) or linear_layout(module) is not None


def holds_columns(module: nn.Module) -> bool:
    """Whether a linear's weight is (K, N)."""
    if isinstance(module, Linear):
        return False
    return isinstance(module, PackedColumns) or linear_layout(module) == "columns"


def columns(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if holds_columns(module) else 1]


def outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if holds_columns(module) else 0]
