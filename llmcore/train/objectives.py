"""What is learned: modules whose result is a batch's loss, summed over its targets.

A loss is a module so that torch's distributed wrappers see a forward pass.
"""

from typing import Any

from torch import Tensor, nn


class CausalLM(nn.Module):
    """Each token from those before it. The model is a Decoder, or one of llmcore.history."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """ids, targets (B, T), cu_seqlens where documents begin -> ()."""
        return self.model.loss(ids, targets, cu_seqlens=cu_seqlens, reduction="sum")
