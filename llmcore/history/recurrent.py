"""Recurrent language models: RNN, GRU and LSTM, torch's own layers.

    h_t = f(x_t, h_(t-1))        logits_t = W h_t + b, W being the embedding

    RNN   tanh(U x + V h)                                    Elman 1990
    LSTM  a cell that is added to, behind three gates        Hochreiter and Schmidhuber 1997
    GRU   two gates and no cell                              Cho et al. 2014

The state is all that a token knows of those before it, and is made one token after the other: a
sequence of T tokens takes T steps that can't be taken at once.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from llmcore import ops

Kind = Literal["rnn", "gru", "lstm"]
_LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@dataclass(frozen=True)
class RecurrentConfig:
    """forget_bias is what an LSTM's forget gates begin with: above 0 they begin open."""

    kind: Kind
    vocab_size: int
    width: int
    layers: int = 1
    forget_bias: float = 0.0
    context_length: int = 1 << 30

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("vocab_size", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Recurrent(nn.Module):
    """A causal language model with the interface of Decoder: hidden, loss, logits."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        layer = _LAYERS[config.kind]
        self.layers = layer(config.width, config.width, config.layers, batch_first=True)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        if config.kind == "lstm":
            with torch.no_grad():
                for name, bias in self.layers.named_parameters():
                    if name.startswith("bias_ih"):  # gates: input, forget, cell, output
                        bias[config.width : 2 * config.width] += config.forget_bias

    def hidden(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, T, C) for ids (B, T).

        cu_seqlens (documents + 1,): the B * T tokens, row by row, are packed documents, each of
        which begins with an empty state.
        """
        embedded = self.embedding(ids)
        if cu_seqlens is None:
            return self.layers(embedded)[0]
        lengths = cu_seqlens.diff().tolist()
        documents = embedded.flatten(0, 1).split(lengths)
        padded = nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
        states, _ = self.layers(padded)
        flat = torch.cat([row[:n] for row, n in zip(states, lengths, strict=True)])
        return flat.view_as(embedded)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V)."""
        return ops.linear(self.hidden(ids, cu_seqlens), self.embedding.weight, self.head_bias)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of targets (B, T), -100 where there is none, in nats."""
        return ops.linear_cross_entropy(
            self.hidden(ids, cu_seqlens),
            self.embedding.weight,
            targets,
            self.head_bias,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
