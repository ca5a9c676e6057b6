"""The decoder: token ids in, logits of the next token out.

    embedding -> block x layers -> norm -> head

Padding never reaches the blocks' arithmetic: the tokens that count are moved to the front of their
row, the blocks see lengths instead of a mask, and the logits are moved back.
"""

import dataclasses

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.models.block import Block, Embedding, Linear, Norm, Pass, rotations
from llmcore.models.cache_base import Cache, Span
from llmcore.models.config import TransformerConfig
from llmcore.models.plan import Plan


class Decoder(nn.Module):
    """A causal language model (Llama's shape, or GPT-2's: see TransformerConfig).

    A plain nn.Module: state_dict, deepcopy, train and gradients work as ever. With tied embeddings
    there is no head: the embedding is used as one, and appears once in the state_dict.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding: nn.Embedding | None = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config)
        self.head: Linear | None = None
        if not config.tied_embeddings:
            self.head = Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) matrices, as GPT-2; what adds to the stream is scaled by its depth."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                into_stream = name.endswith(("attention.output.weight", "down.weight"))
                depth = 2 * self.config.layers if into_stream else 1
                nn.init.normal_(parameter, std=0.02 / depth**0.5)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) for ids (B, T) int64, in the parameters' dtype.

        cache           the tokens before these; it then holds these too
        attention_mask  (B, T), bool or 0/1: False marks padding among *these* ids, on any side;
                        what the logits hold there means nothing
        last_only       only each sequence's last token that counts: (B, 1, V)

        Raises ValueError for wrong shapes, ids of a wrong dtype, or too long a text.
        """
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "ids must be whole numbers (B, T) with T at least 1, "
                f"got {ids.dtype} {tuple(ids.shape)}"
            )
        if attention_mask is None:
            if (logits := self._native_logits(ids, cache, None, last_only)) is not None:
                return logits
            hidden = self._hidden(ids, cache, None)
            return self._logits(hidden[:, -1:] if last_only else hidden)
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        counts = mask.sum(dim=1)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        ids = ids.gather(1, order)
        if (logits := self._native_logits(ids, cache, counts, last_only)) is not None:
            if last_only:
                return logits
            return logits.gather(1, order.argsort(dim=1)[..., None].expand_as(logits))
        hidden = self._hidden(ids, cache, counts)
        last = (counts - 1).clamp(min=0)[:, None]
        wanted = last if last_only else order.argsort(dim=1)
        hidden = hidden.gather(1, wanted[..., None].expand(-1, -1, hidden.shape[-1]))
        return self._logits(hidden)

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
                weight = module.parameter.detach()
                rows = weight.mean(dim=0, keepdim=True).expand(size - old, -1)
                module.weight = nn.Parameter(
                    torch.cat((weight, rows)), requires_grad=module.parameter.requires_grad
                )
        self.embedding.num_embeddings = size
        if self.head is not None:
            self.head.out_features = size
        self.config = dataclasses.replace(self.config, vocab_size=size)

    def _native_logits(
        self, ids: Tensor, cache: Cache | None, counts: Tensor | None, last_only: bool
    ) -> Tensor | None:
        """The logits by one native call; None where there is no cache, or `Plan.refuses` it."""
        if cache is None or (plan := Plan.of(self, cache)) is None:
            return None
        return plan.logits(ids, cache, counts, last_only)

    def _hidden(self, ids: Tensor, cache: Cache | None, counts: Tensor | None) -> Tensor:
        stream = self.embedding(ids).to(self.norm.weight.dtype)  # packed, it gives float32
        span = self._span(stream, counts) if cache is None else cache.reserve(stream, counts)
        rotation = None
        if self.position_embedding is not None:
            stream = stream + self.position_embedding(span.positions)
        else:
            rotation = rotations(self.config, span.positions)
        now = Pass(span, rotation, cache)
        branch = None
        for block in self.blocks:
            stream, branch = block(stream, branch, now)
        hidden, _ = self.norm(stream, branch)
        if cache is not None:
            cache.commit(span)
        return hidden

    def _span(self, stream: Tensor, counts: Tensor | None) -> Span:
        new = stream.shape[1]
        if new > self.config.context_length:
            raise ValueError(f"{new} tokens exceed the context of {self.config.context_length}")
        return Span(torch.arange(new, device=stream.device), counts, 0, new)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden)
        return ops.linear(hidden, self.embedding.weight)


# CONTRACT (being filled in): what training may build on.
#
# Decoder(config)
#   model(ids (B,T), attention_mask=None, cu_seqlens=None) -> logits (B,T,V)
#   model.hidden(ids, attention_mask=None, cu_seqlens=None) -> (B,T,C), ready for the head
#   model.loss(ids, targets, *, cu_seqlens=None, label_smoothing=0.0, reduction="mean") -> loss
#       targets (B,T) int64, -100 where none; by linear_cross_entropy: logits are never whole
#   model.head_weight (V,C), model.head_bias (V,) or None
#   cu_seqlens (documents + 1,) int32/int64: ids' B*T tokens, row by row, are packed documents that
#       begin at 0 and end there: each sees itself only, its positions begin at 0 (attention_varlen)
#   model.checkpoint_blocks = True: activations of a block are computed again in the backward pass
#   config.dropout > 0: active in model.train()


class Encoder(nn.Module):
    """Encoder(config)(ids (B,T), attention_mask=None, token_types=None, cu_seqlens=None) -> hidden
    (B,T,C); attention_mask (B,T), False is padding, on any side.

    config.outputs says which heads there are:
      model.pooled(hidden) -> (B,C)                      "pooler": tanh(dense(first token))
      model.masked_language(hidden) -> logits (...,V)    "masked_language"; hidden (...,C)
      model.next_sentence(hidden) -> logits (B,2)        "next_sentence", through the pooler
      model.masked_language_loss(hidden, targets (B,T), label_smoothing=0.0) -> loss, -100 ignored
    pool(hidden, attention_mask=None, kind="mean"|"first") -> (B,C) is a function beside it.
    """


class EncoderDecoder(nn.Module):
    """EncoderDecoder(config)(source_ids (B,S), target_ids (B,T), source_mask=None) -> logits
    (B,T,V). target_ids begin with config.start_id; both padded on the right, or the source with
    source_mask (False is padding) on any side.

      model.encode(source_ids, source_mask=None) -> hidden (B,S,C)
      model.loss(source_ids, target_ids, targets, source_mask=None, label_smoothing=0.0) -> loss
          targets (B,T), -100 where none
      model.cross_attention(source_ids, target_ids, source_mask=None) -> weights (L,B,H,T,S)
      generate(model, source_ids or texts, max_new_tokens=..., num_beams=...) -> targets
    """
