"""The shape of a transformer: every number and choice that its weights don't say themselves."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

Norm = Literal["rms_norm", "layer_norm"]
Activation = Literal["swiglu", "gelu_tanh"]
Positions = Literal["rope", "learned"]


@dataclass(frozen=True)
class TransformerConfig:
    """One frozen description, checked when made: a model that can't exist is an error here.

    The letters are those of the whole project: V vocabulary, C model width, H query heads, G
    key/value heads (H a multiple of G), D head width, F feed-forward width.

    norm        "rms_norm" (weight only) or "layer_norm" (weight and bias), before each branch
    activation  "swiglu" (gated) or "gelu_tanh" (plain, the tanh form of GPT-2)
    positions   "rope" (half-split pairs, all of D) or "learned" (one vector for each position)
    bias        whether the linear layers of the blocks have one
    window      attention sees the last `window` tokens only, its own included; None: all
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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width",
                 "feed_forward", "context_length")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(
                f"window must be None or a whole number of at least 1, got {self.window!r}"
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        for name in ("bias", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        hints = get_type_hints(type(self))
        for name in ("norm", "activation", "positions"):
            accepted = get_args(hints[name])
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"rope rotates pairs: head_width must be even, got {self.head_width}")
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        for token in self.eos_ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"eos_ids must be token ids below vocab_size {self.vocab_size}, got {token!r}"
                )

    @property
    def attention_window(self) -> tuple[int, int] | None:
        """`window` as ops.attention takes it: keys before and after a query's own."""
        return None if self.window is None else (self.window - 1, 0)
