"""Activations without parameters: recognised by their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.swap.instance import OneTensor
from llmcore.swap.structure import SCALES, Found, draw, own_tensors, takes_one_tensor


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
