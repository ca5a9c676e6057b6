"""RMS norm and layer norm: a weight of one axis (and a bias), one argument, and the formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.swap.instance import OneTensor
from llmcore.swap.structure import SCALES, Found, agrees, draw, own_tensors, takes_one_tensor


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
