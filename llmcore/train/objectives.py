"""What is learned: modules whose result is a batch's loss, summed over its targets.

A loss is a module so that torch's distributed wrappers see a forward pass. Arguments are those of
the batches in llmcore.text: Packed, MaskedPairs, Translations.
"""

from typing import Any

from torch import Tensor, nn

from llmcore import ops
from llmcore.models import Encoder, EncoderDecoder
from llmcore.text.data import IGNORED


class CausalLM(nn.Module):
    """Each token from those before it. The model is a Decoder, or one of llmcore.history."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """ids, targets (B, T), cu_seqlens where documents begin -> ()."""
        return self.model.loss(ids, targets, cu_seqlens=cu_seqlens, reduction="sum")


class MaskedLM(nn.Module):
    """The tokens that are hidden, and whether the second run follows the first, weighted alike.

    The model is an Encoder with the outputs "masked_language", "pooler" and "next_sentence".
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        token_types: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        is_next: Tensor,
    ) -> Tensor:
        """ids, token_types, attention_mask, targets (B, T), is_next (B,) -> ()."""
        hidden = self.model(ids, attention_mask, token_types)
        masked = self.model.masked_language_loss(hidden, targets)
        follows = ops.cross_entropy(self.model.next_sentence(hidden).float(), is_next)
        # Both are means; the loop divides by the number of targets.
        return (masked + follows) * (targets != IGNORED).sum()


class Translation(nn.Module):
    """Each token of the target from those before it and the source; targets may be smoothed.

    Label smoothing is for training: what is validated is the plain cross-entropy.
    """

    def __init__(self, model: EncoderDecoder, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(
        self, source_ids: Tensor, source_mask: Tensor, target_ids: Tensor, targets: Tensor
    ) -> Tensor:
        """source_ids, source_mask (B, S), target_ids, targets (B, T) -> ()."""
        smoothing = self.label_smoothing if self.training else 0.0
        loss = self.model.loss(
            source_ids, target_ids, targets, source_mask, label_smoothing=smoothing
        )
        return loss * (targets != IGNORED).sum()
