"""A residual and its norm: norm(dropout(linear(x)) + residual)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.swap.instance import Swapped, has_hooks
from llmcore.swap.linears import columns, is_linear, outputs
from llmcore.swap.norms import LayerNorm
from llmcore.swap.structure import Found, agrees, draw, own_tensors


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
    linears = [n for n, m in children.items() if is_linear(m)]
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
    linear = next(m for m in module.children() if is_linear(m))
    like = next(module.parameters())
    x = draw(2, 3, columns(linear), like=like)
    return x, draw(2, 3, outputs(linear), like=like, seed=2)
