"""The shape of a transformer: every number and choice that its weights don't say themselves."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

Norm = Literal["rms_norm", "layer_norm"]
NormPlacement = Literal["pre", "post", "both", "parallel"]
Activation = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "silu"]
Positions = Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"]
Output = Literal["pooler", "masked_language", "next_sentence"]

GATED = ("swiglu", "geglu")
SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "feed_forward",
         "context_length", "experts_per_token")  # fmt: skip
COUNTS = ("full_every", "token_types", "experts")  # 0 is none
SWITCHES = ("bias", "qkv_bias", "qk_norm", "norm_offset", "embedding_norm", "head_bias",
            "tied_embeddings")  # fmt: skip
POSITIVE = ("norm_eps", "rope_theta", "embedding_scale", "logit_scale")
POSITIVE_OR_NONE = ("window_rope_theta", "attention_scale", "attention_softcap", "logit_softcap")


@dataclass(frozen=True)
class TransformerConfig:
    """One frozen description, checked when made: a model that can't exist is an error here.

    The letters are those of the whole project: V vocabulary, C model width, H query heads, G
    key/value heads (H a multiple of G), D head width, F feed-forward width. The defaults are
    Llama's. Which model it describes (Decoder, Encoder, EncoderDecoder) is not its business.

    Sizes: vocab_size V, width C, layers (of each stack), heads H, kv_heads G, head_width D,
    feed_forward F, context_length (positions that there are).

    norm            "rms_norm" (weight only) or "layer_norm" (weight and bias)
    norm_placement  "pre": before each branch, and one more behind the last block; "post": of each
                    sum of stream and branch (2017, BERT); "both": before, and of the branch's
                    result before it is added (Gemma 2); "parallel": before, and both branches
                    are of the same stream (GPT-NeoX, Phi)
    norm_offset     an RMS norm multiplies by 1 + weight (Gemma)
    activation      "swiglu", "geglu" (gated; geglu in the tanh form) or "gelu", "gelu_tanh",
                    "relu", "silu" (plain)
    bias            whether the linear layers of the blocks have one
    qkv_bias        queries, keys and values have one even without `bias` (Qwen 2)
    qk_norm         a norm over D of each query and key, before they are rotated (Qwen 3)
    positions       "rope" (pairs, half-split), "learned" (one vector for each position),
                    "sinusoidal" (the same, fixed: sines, then cosines), "alibi" (scores fall with
                    distance), "relative" (T5's learned bias for each bucket of distances), "none"
    rotary_width    R: so many of a head's D are rotated; None: all
    window          attention sees the last `window` tokens only, its own included (an encoder: so
                    many on both sides); None: all
    full_every      every such layer has no window all the same; 0: none (Gemma 2: 2, Gemma 3: 6)
    window_rope_theta   rope_theta of the layers with a window; None: as the others (Gemma 3)
    attention_scale     of the scores; None: 1 / sqrt(D)
    attention_softcap   scores s are softcap * tanh(s / softcap); None: as they are
    logit_softcap       the same of logits
    logit_scale     what the last hidden states are multiplied by before the head (T5: C ** -0.5)
    embedding_scale what embeddings are multiplied by (Gemma and the 2017 transformer: C ** 0.5)
    embedding_norm  a norm of the embeddings' sum (BERT)
    tied_embeddings the head's matrix is the embedding's; head_bias: it has a bias of its own
    experts         feed-forward networks of a block, of which a router chooses experts_per_token
                    for each token (mixture of experts); 0: one, without a router
    dropout         of embeddings, branches and attention weights (not those of packed documents),
                    in training
    eos_ids         tokens that end a text
    start_id        EncoderDecoder: the token that every target begins with
    token_types     Encoder: kinds of token with a vector each (BERT: 2 sentences); 0: none
    outputs         Encoder: what it has besides hidden states, of "pooler", "masked_language" and
                    "next_sentence" (which needs the pooler)
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    context_length: int
    norm: Norm = "rms_norm"
    norm_eps: float = 1e-5
    activation: Activation = "swiglu"
    positions: Positions = "rope"
    rope_theta: float = 10000.0
    bias: bool = False
    tied_embeddings: bool = True
    eos_ids: tuple[int, ...] = ()
    window: int | None = None
    norm_placement: NormPlacement = "pre"
    norm_offset: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    full_every: int = 0
    window_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    head_bias: bool = False
    experts: int = 0
    experts_per_token: int = 2
    rotary_width: int | None = None
    dropout: float = 0.0
    start_id: int | None = None
    token_types: int = 0
    outputs: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        self._check_numbers()
        self._check_choices()
        self._check_tokens()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for names, least in ((SIZES, 1), (COUNTS, 0)):
            for name in names:
                value = getattr(self, name)
                if not _is_whole(value) or value < least:
                    raise ValueError(
                        f"{name} must be a whole number of at least {least}, got {value!r}"
                    )
        rotated = self.rotated
        if not _is_whole(rotated) or not 1 <= rotated <= self.head_width:
            raise ValueError(
                f"rotary_width must be None or 1 to head_width {self.head_width}, got {rotated!r}"
            )
        if self.window is not None and (not _is_whole(self.window) or self.window < 1):
            raise ValueError(
                f"window must be None or a whole number of at least 1, got {self.window!r}"
            )
        given = [name for name in POSITIVE_OR_NONE if getattr(self, name) is not None]
        for name in (*POSITIVE, *given):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def _check_choices(self) -> None:
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        hints = get_type_hints(type(self))
        for name in ("norm", "norm_placement", "activation", "positions"):
            accepted = get_args(hints[name])
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        for output in self.outputs:
            if output not in get_args(Output):
                raise ValueError(f"outputs are {', '.join(get_args(Output))}, got {output!r}")

    def _check_tokens(self) -> None:
        for token in self.eos_ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"eos_ids must be token ids below vocab_size {self.vocab_size}, got {token!r}"
                )
        start = self.start_id
        if start is not None and not (_is_whole(start) and 0 <= start < self.vocab_size):
            raise ValueError(
                f"start_id must be None or a token id below vocab_size {self.vocab_size}, "
                f"got {start!r}"
            )

    def _check_combinations(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.positions == "rope" and self.rotated % 2:
            name = "head_width" if self.rotary_width is None else "rotary_width"
            raise ValueError(f"rope rotates pairs: {name} must be even, got {self.rotated}")
        if self.rotary_width is not None and self.positions != "rope":
            raise ValueError(f"rotary_width needs rope, got positions {self.positions}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(
                f"sinusoidal positions are pairs: width must be even, got {self.width}"
            )
        if self.norm_offset and self.norm != "rms_norm":
            raise ValueError(f"norm_offset belongs to rms_norm, got {self.norm}")
        if self.window is None and (self.full_every or self.window_rope_theta is not None):
            name = "full_every" if self.full_every else "window_rope_theta"
            raise ValueError(f"{name} needs a window, got None")
        if self.window_rope_theta is not None and self.positions != "rope":
            raise ValueError(f"window_rope_theta needs rope, got positions {self.positions}")
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts, {self.experts}, "
                f"got {self.experts_per_token}"
            )
        if "next_sentence" in self.outputs and "pooler" not in self.outputs:
            raise ValueError("outputs: next_sentence needs the pooler")

    def window_of(self, layer: int) -> int | None:
        """The window of this layer, the first being 0; None where it sees all."""
        if self.full_every and (layer + 1) % self.full_every == 0:
            return None
        return self.window

    @property
    def rotated(self) -> int:
        """How many of a head's D are rotated, where positions are."""
        return self.head_width if self.rotary_width is None else self.rotary_width

    @property
    def horizon(self) -> int | None:
        """The newest tokens that some layer may still see; None: all."""
        widest = [self.window_of(layer) for layer in range(self.layers)]
        return None if None in widest else self.window


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
