"""Both ends of a model: token ids to vectors, and hidden states to logits or a loss."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.models.config import TransformerConfig
from llmcore.models.layers import Embedding, Linear

IGNORED = -100  # a target that is none, as in torch


class Vocabulary(nn.Module):
    """A model's embedding, which is its head as well when the two are tied.

    With tied embeddings the matrix appears once in the state_dict, as the embedding.
    """

    config: TransformerConfig

    def add_vocabulary(self, config: TransformerConfig, *, head: bool = True) -> None:
        """The embedding and, where the model predicts tokens, what its head has of its own."""
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.head: Linear | None = None
        self.head_bias: nn.Parameter | None = None
        if head and not config.tied_embeddings:
            self.head = Linear(config.width, config.vocab_size, bias=False)
        if head and config.head_bias:
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, C): the matrix of the logits; ValueError when it is packed."""
        return self.embedding.parameter if self.head is None else self.head.parameter

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors (B, T, C) of ids (B, T); ValueError for ids of a wrong shape or dtype."""
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "ids must be whole numbers (B, T) with T at least 1, "
                f"got {ids.dtype} {tuple(ids.shape)}"
            )
        vectors = self.embedding(ids).to(dtype)  # packed, it gives float32
        scale = self.config.embedding_scale
        return vectors if scale == 1.0 else vectors * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., C)."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = ops.linear(self._scaled(hidden), weight, self.head_bias)
        return self.capped(logits)

    def loss_of(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of hidden states (..., C) with the tokens (...) they should say.

        Targets of -100 don't count. The logits are never whole, but with a logit_softcap.
        """
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
        if self.config.logit_softcap is not None:
            return ops.cross_entropy(self.logits(hidden), targets, **options)
        hidden, weight = self._scaled(hidden), self.head_weight
        return ops.linear_cross_entropy(hidden, weight, targets, self.head_bias, **options)

    def resize_vocab(self, size: int) -> None:
        """Give the vocabulary rows up to `size`; a new one starts as the mean of the old ones.

        (The mean is a token the model finds neither likely nor strange.) Tied embeddings stay tied.
        ValueError when that would take rows away, or for packed weights.
        """
        old = self.config.vocab_size
        if size < old:
            raise ValueError(f"the vocabulary has {old} tokens and can't shrink to {size}")
        for module in (self.embedding, self.head):
            if module is not None:
                module.weight = _longer(module.parameter, size)
        if self.head_bias is not None:
            self.head_bias = _longer(self.head_bias, size)
        self.embedding.num_embeddings = size
        if self.head is not None:
            self.head.out_features = size
        self.config = dataclasses.replace(self.config, vocab_size=size)

    def _scaled(self, hidden: Tensor) -> Tensor:
        scale = self.config.logit_scale
        return hidden if scale == 1.0 else hidden * scale

    def capped(self, logits: Tensor) -> Tensor:
        """Logits within config.logit_softcap, where there is one."""
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * (logits / softcap).tanh()


def _longer(parameter: nn.Parameter, size: int) -> nn.Parameter:
    """With rows up to `size`, each new one the mean of the others."""
    old = parameter.detach()
    mean = old.mean(dim=0, keepdim=True).expand(size - len(old), *old.shape[1:])
    return nn.Parameter(torch.cat((old, mean)), requires_grad=parameter.requires_grad)
