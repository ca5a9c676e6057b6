"""The three models, of one kind of block.

Decoder          token ids in, logits of the next token out          embedding -> stack -> head
Encoder          token ids in, hidden states out                     embedding -> stack
EncoderDecoder   a source text in, its continuation as another one   encoder -> decoder -> head
"""

import torch
from torch import Tensor, nn

from llmcore.models.block import CrossAttention, activate
from llmcore.models.cache_base import Cache, Source
from llmcore.models.config import GATED, TransformerConfig
from llmcore.models.layers import Linear, Norm
from llmcore.models.plan import Plan
from llmcore.models.stack import Front, Stack
from llmcore.models.vocabulary import IGNORED, Vocabulary

# The share of the experts' balance loss in a decoder's loss (Fedus et al., 2021, section 2.2).
BALANCE = 0.01


class Decoder(Vocabulary, Stack):
    """A causal language model (Llama's shape, or GPT-2's, Gemma's ...: see TransformerConfig).

    A plain nn.Module: state_dict, deepcopy, train and gradients work as ever. With tied embeddings
    there is no head: the embedding is used as one, and appears once in the state_dict.
    """

    def __init__(self, config: TransformerConfig, *, cross: bool = False) -> None:
        """cross: its blocks attend to a source too, as in an EncoderDecoder."""
        nn.Module.__init__(self)
        self.add_vocabulary(config)
        self.add_blocks(config, causal=True, cross=cross)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) matrices, as GPT-2; what adds to the stream is scaled by its depth."""
        initialise(self)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        *,
        source: Source | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) for ids (B, T) int64, in the parameters' dtype.

        cache           the tokens before these; it then holds these too
        attention_mask  (B, T), bool or 0/1: False marks padding among *these* ids, on any side;
                        what the logits hold there means nothing
        source          what cross-attention attends to, where not the cache has it
        cu_seqlens      (documents + 1,) int32 or int64: the B * T ids, row by row, are packed
                        documents that end there, the first number being 0. None sees another, and
                        each one's positions begin at 0.
        last_only       only each sequence's last token that counts: (B, 1, V)

        Raises ValueError for wrong shapes, ids of a wrong dtype, or too long a text.
        """
        front = None
        if attention_mask is not None:
            front = Front.of(attention_mask, ids)
            ids = front.front(ids)
        counts = None if front is None else front.counts
        if (logits := self._native_logits(ids, cache, counts, last_only)) is not None:
            return logits if front is None or last_only else front.back(logits)
        vectors = self.embed(ids, self.dtype)
        hidden, _ = self.run(vectors, counts, cache=cache, source=source, cu_seqlens=cu_seqlens)
        if last_only:
            return self.logits(hidden[:, -1:] if front is None else front.last(hidden))
        return self.logits(hidden if front is None else front.back(hidden))

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        *,
        source: Source | None = None,
        cu_seqlens: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of the logits of ids (B, T) with targets (B, T); -100 is no target.

        The logits are never whole. In training experts' balance loss is added, to each target's.
        """
        vectors = self.embed(ids, self.dtype)
        hidden, balance = self.run(vectors, source=source, cu_seqlens=cu_seqlens)
        loss = self.loss_of(hidden, targets, label_smoothing=label_smoothing, reduction=reduction)
        if balance and reduction != "none":
            share = BALANCE * torch.stack(balance).sum().to(loss.dtype)
            loss = loss + share * ((targets != IGNORED).sum() if reduction == "sum" else 1)
        return loss

    def hidden(self, ids: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C), as the head takes them: `logits` and `loss_of` go on."""
        return self.run(self.embed(ids, self.dtype), cu_seqlens=cu_seqlens)[0]

    def read(self, hidden: Tensor, lengths: Tensor | None = None) -> Source:
        """A source's hidden states (B, S, C), of which lengths (B,) count, as keys and values."""
        layers = [m for m in self.modules() if isinstance(m, CrossAttention)]
        pairs = [layer.read(hidden) for layer in layers]
        return Source([k for k, _ in pairs], [v for _, v in pairs], lengths)

    def _native_logits(
        self, ids: Tensor, cache: Cache | None, counts: Tensor | None, last_only: bool
    ) -> Tensor | None:
        """The logits by one native call; None where there is no cache, or no plan."""
        if cache is None or (plan := Plan.of(self, cache)) is None:
            return None
        return plan.logits(ids, cache, counts, last_only)


class MaskedLanguageHead(nn.Module):
    """BERT's: a layer and a norm before the logits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = "gelu" if config.activation in GATED else config.activation
        self.dense = Linear(config.width, config.width)
        self.norm = Norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.norm(activate(self.activation, self.dense(hidden)))[0]


class Encoder(Vocabulary, Stack):
    """A model that reads a text both ways (BERT's shape): a vector for each token.

    config.outputs says what it has besides: "pooler" (`pooled`), "masked_language" and
    "next_sentence".
    """

    def __init__(self, config: TransformerConfig) -> None:
        nn.Module.__init__(self)
        self.add_vocabulary(config, head="masked_language" in config.outputs)
        self.add_blocks(config, causal=False)
        self.token_type_embedding: nn.Embedding | None = None
        if config.token_types:
            self.token_type_embedding = nn.Embedding(config.token_types, config.width)
        has = config.outputs
        self.pooler = Linear(config.width, config.width) if "pooler" in has else None
        self.masked_language_head = MaskedLanguageHead(config) if "masked_language" in has else None
        self.next_sentence_head = Linear(config.width, 2) if "next_sentence" in has else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) matrices, as BERT."""
        initialise(self, by_depth=self.norm is not None)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T) int64, in the parameters' dtype.

        attention_mask  (B, T), bool or 0/1: False marks padding, on any side; what the result holds
                        there means nothing. Padding takes no position.
        token_types     (B, T) int64, which kind of token each is; None: all 0
        cu_seqlens      packed documents, as in Decoder.forward

        Raises ValueError for wrong shapes, ids of a wrong dtype, or too long a text.
        """
        types = self._types(ids, token_types)
        front = None
        if attention_mask is not None:
            front = Front.of(attention_mask, ids)
            ids = front.front(ids)
            types = None if types is None else front.front(types)
        vectors = self.embed(ids, self.dtype)
        if self.token_type_embedding is not None:
            vectors = vectors + self.token_type_embedding(types)
        counts = None if front is None else front.counts
        hidden, _ = self.run(vectors, counts, cu_seqlens=cu_seqlens)
        return hidden if front is None else front.back(hidden)

    def pooled(self, hidden: Tensor) -> Tensor:
        """(B, C) of hidden states (B, T, C): tanh of a layer over the first token's."""
        if self.pooler is None:
            raise ValueError(_lacks("pooler", self.config))
        return self.pooler(hidden[:, 0]).tanh()

    def next_sentence(self, hidden: Tensor) -> Tensor:
        """Logits (B, 2) of hidden states (B, T, C): the second sentence follows, or it doesn't."""
        if self.next_sentence_head is None:
            raise ValueError(_lacks("next_sentence", self.config))
        return self.next_sentence_head(self.pooled(hidden))

    def masked_language(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C): which token stands there."""
        if self.masked_language_head is None:
            raise ValueError(_lacks("masked_language", self.config))
        return self.logits(self.masked_language_head(hidden))

    def masked_language_loss(
        self, hidden: Tensor, targets: Tensor, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy of hidden states (B, T, C) with targets (B, T); -100 is no target.

        Only the hidden states that have a target go through the head.
        """
        if self.masked_language_head is None:
            raise ValueError(_lacks("masked_language", self.config))
        chosen = targets != IGNORED
        return self.loss_of(
            self.masked_language_head(hidden[chosen]),
            targets[chosen],
            label_smoothing=label_smoothing,
        )

    def _types(self, ids: Tensor, token_types: Tensor | None) -> Tensor | None:
        if self.token_type_embedding is None:
            if token_types is not None:
                raise ValueError("token_types: the model has none, config.token_types is 0")
            return None
        if token_types is None:
            return torch.zeros_like(ids)
        if token_types.shape != ids.shape:
            raise ValueError(
                f"token_types must have the shape of ids {tuple(ids.shape)}, "
                f"got {tuple(token_types.shape)}"
            )
        return token_types


class EncoderDecoder(nn.Module):
    """The transformer of 2017: a decoder whose blocks also attend to an encoder's hidden states.

    Source and target share one vocabulary and embedding.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.encoder = Stack(config, causal=False)
        self.decoder = Decoder(config, cross=True)
        self.reset_parameters()

    @property
    def config(self) -> TransformerConfig:
        return self.decoder.config

    def reset_parameters(self) -> None:
        """Glorot's uniform matrices, as torch's nn.Transformer; embeddings Normal(0, C ** -0.5)."""
        width = self.config.width
        for module in self.modules():
            if isinstance(module, Norm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, C) of source_ids (B, S); source_mask (B, S), False is padding."""
        hidden, front = self._encode(source_ids, source_mask)
        return hidden if front is None else front.back(hidden)

    def read(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Source:
        """The source as every later pass over the target sees it; a cache takes it as `source`."""
        hidden, front = self._encode(source_ids, source_mask)
        return self.decoder.read(hidden, None if front is None else front.counts)

    def forward(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the tokens after target_ids (B, T), given source_ids (B, S).

        Targets begin with config.start_id. A target's padding, on the right, needs no mask: no
        token before it sees it.
        """
        return self.decoder(target_ids, source=self.read(source_ids, source_mask))

    def loss(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        targets: Tensor,
        source_mask: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of `forward`'s logits with targets (B, T); -100 is no target."""
        source = self.read(source_ids, source_mask)
        return self.decoder.loss(
            target_ids, targets, source=source, label_smoothing=label_smoothing
        )

    @torch.no_grad()
    def cross_attention(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        """What each target token looks at: weights (layers, B, H, T, S), for pictures.

        source_mask must be padding on the right, if there is any.
        """
        source = self.read(source_ids, source_mask)
        found: list[Tensor] = []

        def look(module: CrossAttention, inputs: tuple[Tensor, ...]) -> None:
            found.append(module.weights(inputs[0], source))

        layers = [m for m in self.decoder.modules() if isinstance(m, CrossAttention)]
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        try:
            self.decoder(target_ids, source=source)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found)

    def _encode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Front | None]:
        """Hidden states, a padded row's own in front, and how to put them back."""
        front = None if mask is None else Front.of(mask, ids, "source_mask")
        vectors = self.decoder.embed(ids if front is None else front.front(ids), self.encoder.dtype)
        hidden, _ = self.encoder.run(vectors, None if front is None else front.counts)
        return hidden, front


def initialise(model: Stack, *, by_depth: bool = True) -> None:
    """Normal(0, 0.02) matrices; by_depth: what adds to the stream is divided by sqrt(2 layers)."""
    depth = 2 * model.config.layers if by_depth else 1
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            into_stream = name.endswith(("attention.output", "down"))
            nn.init.normal_(module.weight, std=0.02 / (depth if into_stream else 1) ** 0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _lacks(output: str, config: TransformerConfig) -> str:
    return f"the encoder has no {output}: config.outputs is {config.outputs!r}"
