"""The layers that blocks and models are made of, each a module around one op."""

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.models.config import TransformerConfig
from llmcore.ops import contract
from llmcore.ops.packed_weight import PackedWeight


class Packable(nn.Module):
    """A module whose weight is a parameter, or a PackedWeight in its place, which is none."""

    weight: nn.Parameter | PackedWeight

    @property
    def parameter(self) -> nn.Parameter:
        """The weight; ValueError when it is packed."""
        if isinstance(self.weight, PackedWeight):
            raise ValueError(
                "the model's weights are packed, for inference: load it without `weights`"
            )
        return self.weight

    def pack(self, weight: PackedWeight) -> None:
        """Take this weight in the place of the parameter."""
        del self.weight
        self.weight = weight


class Linear(Packable, nn.Linear):  # type: ignore[misc]
    """y = x Wᵀ + b through `ops.linear`; parameters as in torch: weight (out, in), bias (out,)."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Embedding(Packable, nn.Embedding):  # type: ignore[misc]
    """A row of the weight (V, C) for each token."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return self.weight.rows(input)
        return super().forward(input)


class Norm(nn.Module):
    """RMS norm (weight) or layer norm (weight, bias) over the last axis, alone or after an add."""

    def __init__(self, config: TransformerConfig, width: int | None = None) -> None:
        """width: of the last axis, the model's unless given."""
        super().__init__()
        width = config.width if width is None else width
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.empty(width))
        self.bias: nn.Parameter | None = None
        if config.norm == "layer_norm":
            self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A norm that only normalises."""
        nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(stream + branch) and the sum itself, both (B, T, C)."""
        weight = contract.widen(self.weight) + 1.0 if self.offset else self.weight
        if self.bias is None:
            if branch is None:
                return ops.rms_norm(stream, weight, self.eps), stream
            return ops.add_rms_norm(branch, stream, weight, self.eps)
        if branch is None:
            return ops.layer_norm(stream, weight, self.bias, self.eps), stream
        return ops.add_layer_norm(branch, stream, weight, self.bias, self.eps)
