"""Other libraries' names for our parameters, both ways: one table for each family.

A table maps a module of ours to the modules whose rows, one below the other, are its own: Hugging
Face keeps queries, keys and values apart, we don't. Reading and writing use the same table.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import TransformerConfig
from llmcore.models.packed import check_not_packed
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import Integers, PackedWeight, from_integers


@dataclass(frozen=True)
class Family:
    """How one library names a model's modules; `{}` is the layer's number.

    interleaved  modules whose rows are in the order of interleaved rotary pairs, (0, 1), (2, 3) ...
                 of each head, where ours are half-split: (0, D/2), (1, D/2 + 1) ...
    ignored      tensors that hold nothing of the model's own
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    interleaved: tuple[str, ...] = ()
    ignored: str = r"(?!)"


HUGGING_FACE_LLAMA = Family(
    "a Hugging Face Llama",
    {
        "embedding": ("model.embed_tokens",),
        "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
        "blocks.{}.attention.qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "blocks.{}.attention.output": ("model.layers.{}.self_attn.o_proj",),
        "blocks.{}.feed_forward_norm": ("model.layers.{}.post_attention_layernorm",),
        "blocks.{}.feed_forward.up": (
            "model.layers.{}.mlp.gate_proj",
            "model.layers.{}.mlp.up_proj",
        ),
        "blocks.{}.feed_forward.down": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    },
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

GGUF_LLAMA = Family(
    "a GGUF llama",
    {
        "embedding": ("token_embd",),
        "blocks.{}.attention_norm": ("blk.{}.attn_norm",),
        "blocks.{}.attention.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
        "blocks.{}.attention.output": ("blk.{}.attn_output",),
        "blocks.{}.feed_forward_norm": ("blk.{}.ffn_norm",),
        "blocks.{}.feed_forward.up": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
        "blocks.{}.feed_forward.down": ("blk.{}.ffn_down",),
        "norm": ("output_norm",),
        "head": ("output",),
    },
    interleaved=("blk.{}.attn_q", "blk.{}.attn_k"),
)

LLMCORE = Family(
    "an llmcore", {name: (name,) for name in [*HUGGING_FACE_LLAMA.modules, "position_embedding"]}
)


def to_ours(theirs: Mapping[str, Tensor], family: Family, config: TransformerConfig) -> Decoder:
    """A float32 decoder with these weights.

    ValueError, with the tensors' names, when some are missing, superfluous, of another shape than
    the config's, or no floating-point numbers.
    """
    with torch.device("meta"):
        model = Decoder(config)
    state = {}
    left = {name for name in theirs if not re.fullmatch(family.ignored, name)}
    if config.tied_embeddings:  # some files repeat the embedding as a head
        left -= {f"{module}.weight" for module in family.modules["head"]}
    for name, expected in model.state_dict().items():
        sources = _sources(name, family)
        missing = [source for source, _ in sources if source not in theirs]
        if missing:
            raise ValueError(f"{family.name} model must have {', '.join(missing)}: not found")
        counts = _rows(expected, len(sources), config)
        for (source, _), count in zip(sources, counts, strict=True):
            _check(source, theirs[source], (count, *expected.shape[1:]))
            left.discard(source)
        state[name] = _joined([theirs[source] for source, _ in sources], sources, config).float()
    if left:
        names = ", ".join(sorted(left)[:4]) + (" ..." if len(left) > 4 else "")
        raise ValueError(f"{len(left)} tensors have no place in {family.name} model: {names}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def packed_to_ours(
    theirs: Mapping[str, Integers], family: Family, config: TransformerConfig
) -> dict[str, PackedWeight]:
    """The modules of ours whose matrices are all there, of one format: their integers as they are.

    `theirs` holds what `to_ours` has checked, as integers where it is quantised.
    """
    packed = {}
    with torch.device("meta"):
        names = [name for name, _ in Decoder(config).named_parameters() if name.endswith(".weight")]
    for name in names:
        sources = _sources(name, family)
        parts = [theirs[source] for source, _ in sources if source in theirs]
        if len(parts) < len(sources) or len({(p.format, p.minimums is None) for p in parts}) > 1:
            continue
        minimums = [p.minimums for p in parts if p.minimums is not None]
        packed[name.removesuffix(".weight")] = from_integers(
            parts[0].format,
            _joined([p.q for p in parts], sources, config),
            _joined([p.scales for p in parts], sources, config),
            _joined(minimums, sources, config) if minimums else None,
        )
    return packed


def to_theirs(model: Decoder, family: Family) -> dict[str, Tensor]:
    """The decoder's weights under the family's names, in the parameters' dtype, as copies.

    ValueError for packed weights.
    """
    check_not_packed(model)
    theirs = {}
    for name, tensor in model.state_dict().items():
        sources = _sources(name, family)
        parts = tensor.split(_rows(tensor, len(sources), model.config))
        for (source, interleaved), part in zip(sources, parts, strict=True):
            theirs[source] = (_interleaved(part, model.config) if interleaved else part).clone()
    return theirs


def to_transformers(model: Decoder, attention: str = "eager") -> Any:
    """The stock transformers.LlamaForCausalLM with copies of these weights, in eval mode.

    attention  its attn_implementation
    ImportError without transformers, ValueError when the model isn't Llama's shape.
    """
    import transformers

    config = transformers.LlamaConfig(**config_to_hugging_face(model.config))
    stock = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=model.embedding.parameter.dtype
    )
    theirs = to_theirs(model, HUGGING_FACE_LLAMA)
    if model.config.tied_embeddings:  # they name the shared tensor twice
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    stock.load_state_dict(theirs)
    return stock.eval()


def config_from_hugging_face(found: Mapping[str, Any]) -> TransformerConfig:
    """From the contents of a Llama's config.json; ValueError for what our decoder doesn't do."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    bias = bool(found.get("attention_bias", False))
    demands = {
        "model_type": (found.get("model_type"), "llama"),
        "hidden_act": (found.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "mlp_bias": (bool(found.get("mlp_bias", False)), bias),
        "quantization_config": (found.get("quantization_config"), None),
    }
    for name, (value, accepted) in demands.items():
        if value != accepted:
            raise ValueError(f"{name} {value!r} in config.json: accepted is {accepted!r}")
    heads, width = found["num_attention_heads"], found["hidden_size"]
    eos = found.get("eos_token_id")
    return TransformerConfig(
        vocab_size=found["vocab_size"],
        width=width,
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_width=found.get("head_dim") or width // heads,
        feed_forward=found["intermediate_size"],
        context_length=found["max_position_embeddings"],
        norm_eps=found.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", found.get("rope_theta", 10000.0))),
        bias=bias,
        tied_embeddings=found.get("tie_word_embeddings", False),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def config_to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """Keyword arguments for transformers.LlamaConfig; ValueError for another shape than Llama's."""
    shape = (config.norm, config.activation, config.positions)
    if shape != ("rms_norm", "swiglu", "rope"):
        raise ValueError(f"a Llama has rms_norm, swiglu and rope, not {', '.join(shape)}")
    if config.window is not None:
        raise ValueError(f"a Llama's attention has no window, not one of {config.window}")
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.feed_forward,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied_embeddings,
        "eos_token_id": list(config.eos_ids) or None,
        "bos_token_id": None,
    }


def config_from_gguf(fields: Mapping[str, Any], tied_embeddings: bool) -> TransformerConfig:
    """From a GGUF file's fields; ValueError for what our decoder doesn't do, KeyError for a gap."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_width = fields.get("llama.attention.key_length", width // heads)
    demands = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.rope.dimension_count": head_width,
        "llama.attention.value_length": head_width,
    }
    for name, accepted in demands.items():
        if fields.get(name, accepted) != accepted:
            raise ValueError(f"{name} is {fields[name]!r}: accepted is {accepted!r}")
    ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return TransformerConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        width=width,
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_width=head_width,
        feed_forward=fields["llama.feed_forward_length"],
        context_length=fields["llama.context_length"],
        # GGUF holds float32: the shortest decimal gives back the number meant, 1e-05.
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        tied_embeddings=tied_embeddings,
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _sources(name: str, family: Family) -> list[tuple[str, bool]]:
    """(their name, interleaved?) of the tensors that make up our parameter, in order of rows."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blocks\.(\d+)\.", module)
    key = re.sub(r"^blocks\.\d+\.", "blocks.{}.", module)
    number = layer[1] if layer else ""
    return [
        (f"{theirs.format(number)}.{kind}", theirs in family.interleaved)
        for theirs in family.modules[key]
    ]


def _rows(tensor: Tensor, parts: int, config: TransformerConfig) -> list[int]:
    """How many rows of our parameter each of its parts gives."""
    if parts == 3:
        kv = config.kv_heads * config.head_width
        return [config.heads * config.head_width, kv, kv]
    return [tensor.shape[0] // parts] * parts


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; the config says {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; floating-point weights are accepted")


def _joined(
    parts: list[Tensor], sources: list[tuple[str, bool]], config: TransformerConfig
) -> Tensor:
    """The parts that `_sources` names, one below the other, their rows in our order."""
    rows = [
        _half_split(part, config) if interleaved else part
        for part, (_, interleaved) in zip(parts, sources, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _half_split(rows: Tensor, config: TransformerConfig) -> Tensor:
    """Rows (heads, D/2, 2) as (heads, 2, D/2)."""
    pairs = rows.reshape(-1, config.head_width // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _interleaved(rows: Tensor, config: TransformerConfig) -> Tensor:
    """The way back: rows (heads, 2, D/2) as (heads, D/2, 2)."""
    halves = rows.reshape(-1, 2, config.head_width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
