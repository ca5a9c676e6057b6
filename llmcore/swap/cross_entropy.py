"""torch's cross entropy as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.ops import contract
from llmcore.swap.instance import Swapped
from llmcore.swap.structure import Found, draw


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
