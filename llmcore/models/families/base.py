"""What a table of names says, and what the tables have in common."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcore.models.config import TransformerConfig
from llmcore.models.transformer import Decoder, Encoder, EncoderDecoder

Model = Decoder | Encoder | EncoderDecoder
Found = Mapping[str, Any]

PLAIN: Found = {"quantization_config": None}
# Their names of activations that are not gated.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _unchanged(config: TransformerConfig, _: Iterable[str]) -> TransformerConfig:
    return config


@dataclass(frozen=True)
class Family:
    """How one library names a model's modules and describes its shape.

    model        our class
    modules      ours: theirs, without .weight and .bias; or a whole parameter's name: theirs
    prefix       what the names of their base model begin with, which some files leave out
    interleaved  modules whose rows are in the order of interleaved rotary pairs, (0, 1), (2, 3) ...
                 of each head, where ours are half-split: (0, D/2), (1, D/2 + 1) ...
    transposed   modules whose weights are (in, out)
    unsqueezed   parameters that have an axis of 1 in front
    ignored      tensors that hold nothing of the model's own, as a regular expression
    kind         their model_type
    stock        transformers' class, or classes by the outputs that an encoder has
    keys, defaults   fields of our config: keys of theirs; what a key is that config.json lacks
    fixed        fields that all models of the family share
    required     their keys, and the only value that we know what to do with
    read, write  the fields, and keys, that are no copies
    parts        our config, completed by the names of the tensors that there are
    """

    name: str
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: type[Model] = Decoder
    prefix: str = ""
    interleaved: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    unsqueezed: tuple[str, ...] = ()
    ignored: str = r"(?!)"
    kind: str = ""
    stock: str | Mapping[tuple[str, ...], str] = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Found = field(default_factory=dict)
    fixed: Found = field(default_factory=dict)
    required: Found = field(default_factory=dict)
    read: Callable[[Found], dict[str, Any]] = _nothing
    write: Callable[[TransformerConfig], dict[str, Any]] = _nothing
    parts: Callable[[TransformerConfig, Iterable[str]], TransformerConfig] = _unchanged


def choose(value: Any, accepted: Mapping[Any, str], key: str) -> str:
    if value not in accepted:
        raise ValueError(f"{key} {value!r} in config.json: accepted are {', '.join(accepted)}")
    return accepted[value]


def inverse(table: Mapping[str, str], value: str) -> str | None:
    """The first key of this value; None, which the way back refuses, when there is none."""
    return next((key for key, found in table.items() if found == value), None)


def multi_head(heads: int, width: int) -> dict[str, Any]:
    return {"kv_heads": heads, "head_width": width // heads}
