"""The families of models that other libraries write, one table each, read in both directions.

`modules` maps a module of ours to the modules whose rows, one below the other, are its own: Hugging
Face keeps queries, keys and values apart, we don't. `{}` is a number: of the layer, of the expert.
`keys` maps a field of our config to its key in their config.json; what is no plain copy stands in
`read` and `write`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcore.models.config import TransformerConfig
from llmcore.models.positions import BUCKETS, FAR
from llmcore.models.transformer import Decoder, Encoder, EncoderDecoder

Model = Decoder | Encoder | EncoderDecoder
Found = Mapping[str, Any]


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
    stock        transformers' class
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
    stock: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Found = field(default_factory=dict)
    fixed: Found = field(default_factory=dict)
    required: Found = field(default_factory=dict)
    read: Callable[[Found], dict[str, Any]] = _nothing
    write: Callable[[TransformerConfig], dict[str, Any]] = _nothing
    parts: Callable[[TransformerConfig, Iterable[str]], TransformerConfig] = _unchanged


def _choose(value: Any, accepted: Mapping[Any, str], key: str) -> str:
    if value not in accepted:
        raise ValueError(f"{key} {value!r} in config.json: accepted are {', '.join(accepted)}")
    return accepted[value]


def _inverse(table: Mapping[str, str], value: str) -> str | None:
    """The first key of this value; None, which the way back refuses, when there is none."""
    return next((key for key, found in table.items() if found == value), None)


# ------------------------------------------------------------------------------ Llama's relatives

_LLAMA_MODULES = {
    "embedding": ("model.embed_tokens",),
    "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attention.qkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.output": ("model.layers.{}.self_attn.o_proj",),
    "blocks.{}.feed_forward_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.feed_forward.up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.feed_forward.down": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
_QK_NORMS = {
    "blocks.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "blocks.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
}
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "feed_forward": "intermediate_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_PLAIN = {"quantization_config": None}
_GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def _rope_theta(found: Found) -> float:
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} in config.json: accepted is 'default'")
    return float(rope.get("rope_theta", found.get("rope_theta", 10000.0)))


def _read_llama(found: Found) -> dict[str, Any]:
    heads = found["num_attention_heads"]
    return {
        "kv_heads": found.get("num_key_value_heads") or heads,
        "head_width": found.get("head_dim") or found["hidden_size"] // heads,
        "rope_theta": _rope_theta(found),
        "activation": _choose(found.get("hidden_act", "silu"), _GATED, "hidden_act"),
    }


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"hidden_act": _inverse(_GATED, config.activation), "rope_parameters": rope}


def _read_llama_bias(found: Found) -> dict[str, Any]:
    bias = bool(found.get("attention_bias", False))
    if bool(found.get("mlp_bias", False)) != bias:
        raise ValueError(
            f"mlp_bias {not bias} beside attention_bias {bias} in config.json: accepted is {bias}"
        )
    return {**_read_llama(found), "bias": bias}


def _write_llama_bias(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_llama(config), "attention_bias": config.bias, "mlp_bias": config.bias}


HUGGING_FACE_LLAMA = Family(
    "a Hugging Face Llama",
    _LLAMA_MODULES,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    kind="llama",
    stock="LlamaForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    required=_PLAIN,
    read=_read_llama_bias,
    write=_write_llama_bias,
)


def _read_window(found: Found) -> dict[str, Any]:
    return {**_read_llama(found), "window": found.get("sliding_window")}


def _write_window(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_llama(config), "sliding_window": config.window}


HUGGING_FACE_MISTRAL = Family(
    "a Hugging Face Mistral",
    _LLAMA_MODULES,
    kind="mistral",
    stock="MistralForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    required=_PLAIN,
    read=_read_window,
    write=_write_window,
)

HUGGING_FACE_MIXTRAL = Family(
    "a Hugging Face Mixtral",
    {
        **{name: theirs for name, theirs in _LLAMA_MODULES.items() if "feed_forward." not in name},
        "blocks.{}.feed_forward.router": ("model.layers.{}.block_sparse_moe.gate",),
        "blocks.{}.feed_forward.experts.{}.up": (
            "model.layers.{}.block_sparse_moe.experts.{}.w1",
            "model.layers.{}.block_sparse_moe.experts.{}.w3",
        ),
        "blocks.{}.feed_forward.experts.{}.down": (
            "model.layers.{}.block_sparse_moe.experts.{}.w2",
        ),
    },
    kind="mixtral",
    stock="MixtralForCausalLM",
    keys={
        **_LLAMA_KEYS,
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    defaults={
        **_LLAMA_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    required=_PLAIN,
    read=_read_window,
    write=_write_window,
)

_QWEN_REQUIRED = {**_PLAIN, "use_sliding_window": False}

HUGGING_FACE_QWEN2 = Family(
    "a Hugging Face Qwen2",
    _LLAMA_MODULES,
    kind="qwen2",
    stock="Qwen2ForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    fixed={"qkv_bias": True},
    required=_QWEN_REQUIRED,
    read=_read_llama,
    write=_write_llama,
)

HUGGING_FACE_QWEN3 = Family(
    "a Hugging Face Qwen3",
    {**_LLAMA_MODULES, **_QK_NORMS},
    kind="qwen3",
    stock="Qwen3ForCausalLM",
    keys=_LLAMA_KEYS,
    defaults={**_LLAMA_DEFAULTS, "head_dim": 128},
    fixed={"qk_norm": True},
    required={**_QWEN_REQUIRED, "attention_bias": False},
    read=_read_llama,
    write=_write_llama,
)

# -------------------------------------------------------------------------------------------- Gemma

_GEMMA_FIXED = {"norm_offset": True}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
_GEMMA_REQUIRED = {**_PLAIN, "attention_bias": False, "use_bidirectional_attention": (None, False)}
_SANDWICH = {
    "blocks.{}.attention_after_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.feed_forward_norm": ("model.layers.{}.pre_feedforward_layernorm",),
    "blocks.{}.feed_forward_after_norm": ("model.layers.{}.post_feedforward_layernorm",),
}


def _read_gemma(found: Found) -> dict[str, Any]:
    activation = found.get("hidden_activation") or found.get("hidden_act", "gelu_pytorch_tanh")
    shape = _read_llama({**found, "hidden_act": activation, "rope_parameters": None})
    return {**shape, "embedding_scale": found["hidden_size"] ** 0.5}


def _read_gemma1(found: Found) -> dict[str, Any]:
    return {**_read_gemma(found), "rope_theta": _rope_theta(found)}


HUGGING_FACE_GEMMA = Family(
    "a Hugging Face Gemma",
    _LLAMA_MODULES,
    kind="gemma",
    stock="GemmaForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_GEMMA_DEFAULTS,
    fixed=_GEMMA_FIXED,
    required=_GEMMA_REQUIRED,
    read=_read_gemma1,
    write=_write_llama,
)


def _read_layers(found: Found, every: int) -> dict[str, Any]:
    """window and full_every of layer_types; `every` is the family's own where there are none."""
    count = found["num_hidden_layers"]
    pattern = found.get("sliding_window_pattern", every)
    types = found.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)
    ]
    full = [i + 1 for i, kind in enumerate(types) if kind == "full_attention"]
    if len(full) == count:
        return {"window": None}
    step = full[0] if full else 0
    if full != (list(range(step, count + 1, step)) if step else []):
        raise ValueError(
            "layer_types in config.json: accepted is full_attention in every n-th layer, "
            f"got it in layers {full}, the first being 1"
        )
    return {"window": found["sliding_window"], "full_every": step}


def _write_layers(config: TransformerConfig) -> dict[str, Any]:
    windows = [config.window_of(layer) for layer in range(config.layers)]
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    # An unused number where no layer has a window: the key must be there.
    return {"layer_types": types, "sliding_window": config.window or config.context_length}


def _read_scores(found: Found) -> dict[str, Any]:
    scalar, width = found["query_pre_attn_scalar"], found["head_dim"]
    return {
        "attention_scale": None if scalar == width else scalar**-0.5,
        "attention_softcap": found.get("attn_logit_softcapping"),
        "logit_softcap": found.get("final_logit_softcapping"),
    }


def _write_scores(config: TransformerConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {
        "query_pre_attn_scalar": config.head_width if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read_gemma2(found: Found) -> dict[str, Any]:
    return {**_read_gemma1(found), **_read_layers(found, 2), **_read_scores(found)}


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    shape = _write_llama(config)
    activation = shape.pop("hidden_act")
    return {
        **shape,
        "hidden_activation": activation,
        **_write_layers(config),
        **_write_scores(config),
    }


HUGGING_FACE_GEMMA2 = Family(
    "a Hugging Face Gemma 2",
    {**_LLAMA_MODULES, **_SANDWICH},
    kind="gemma2",
    stock="Gemma2ForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_GEMMA_DEFAULTS,
    fixed={**_GEMMA_FIXED, "norm_placement": "both"},
    required=_GEMMA_REQUIRED,
    read=_read_gemma2,
    write=_write_gemma2,
)


def _read_gemma3(found: Found) -> dict[str, Any]:
    ropes = found.get("rope_parameters") or {
        "full_attention": {"rope_theta": found.get("rope_theta", 1e6)},
        "sliding_attention": {"rope_theta": found.get("rope_local_base_freq", 1e4)},
    }
    theta, local = (
        _rope_theta({"rope_parameters": ropes[f"{kind}_attention"]}) for kind in ("full", "sliding")
    )
    if found.get("rope_scaling"):
        raise ValueError("rope_scaling in config.json: accepted is none")
    shape = {**_read_gemma(found), **_read_layers(found, 6), **_read_scores(found)}
    windowed = shape["window"] is not None
    return {**shape, "rope_theta": theta, "window_rope_theta": local if windowed else None}


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    local = config.window_rope_theta or config.rope_theta
    ropes = {"full_attention": config.rope_theta, "sliding_attention": local}
    types = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ropes.items()}
    return {**_write_gemma2(config), "rope_parameters": types}


HUGGING_FACE_GEMMA3 = Family(
    "a Hugging Face Gemma 3",
    {**_LLAMA_MODULES, **_SANDWICH, **_QK_NORMS},
    kind="gemma3_text",
    stock="Gemma3ForCausalLM",
    keys=_LLAMA_KEYS,
    defaults=_GEMMA_DEFAULTS,
    fixed={**_GEMMA_FIXED, "norm_placement": "both", "qk_norm": True},
    required=_GEMMA_REQUIRED,
    read=_read_gemma3,
    write=_write_gemma3,
)

# -------------------------------------------------------------------------------------------- GPT-2

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _multi_head(heads: int, width: int) -> dict[str, Any]:
    return {"kv_heads": heads, "head_width": width // heads}


def _read_gpt2(found: Found) -> dict[str, Any]:
    activation = found.get("activation_function", "gelu_new")
    return {
        **_multi_head(found["n_head"], found["n_embd"]),
        "feed_forward": found.get("n_inner") or 4 * found["n_embd"],
        "activation": _choose(activation, _ACTIVATIONS, "activation_function"),
    }


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    activation = _inverse(_ACTIVATIONS, config.activation)
    return {"n_inner": config.feed_forward, "activation_function": activation}


HUGGING_FACE_GPT2 = Family(
    "a Hugging Face GPT-2",
    {
        "embedding": ("transformer.wte",),
        "position_embedding": ("transformer.wpe",),
        "blocks.{}.attention_norm": ("transformer.h.{}.ln_1",),
        "blocks.{}.attention.qkv": ("transformer.h.{}.attn.c_attn",),
        "blocks.{}.attention.output": ("transformer.h.{}.attn.c_proj",),
        "blocks.{}.feed_forward_norm": ("transformer.h.{}.ln_2",),
        "blocks.{}.feed_forward.up": ("transformer.h.{}.mlp.c_fc",),
        "blocks.{}.feed_forward.down": ("transformer.h.{}.mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    prefix="transformer.",
    transposed=(
        "transformer.h.{}.attn.c_attn",
        "transformer.h.{}.attn.c_proj",
        "transformer.h.{}.mlp.c_fc",
        "transformer.h.{}.mlp.c_proj",
    ),
    ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    kind="gpt2",
    stock="GPT2LMHeadModel",
    keys={
        "vocab_size": "vocab_size",
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "context_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
    },
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    fixed={"norm": "layer_norm", "positions": "learned", "bias": True},
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        **_PLAIN,
    },
    read=_read_gpt2,
    write=_write_gpt2,
)

# --------------------------------------------------------------------------------------------- BERT


def _read_bert(found: Found) -> dict[str, Any]:
    return {
        **_multi_head(found["num_attention_heads"], found["hidden_size"]),
        "activation": _choose(found.get("hidden_act", "gelu"), _ACTIVATIONS, "hidden_act"),
    }


def _write_bert(config: TransformerConfig) -> dict[str, Any]:
    return {"hidden_act": _inverse(_ACTIVATIONS, config.activation)}


def _bert_parts(config: TransformerConfig, names: Iterable[str]) -> TransformerConfig:
    import dataclasses

    there = set(names)
    marks = {
        "pooler": "bert.pooler.dense.weight",
        "masked_language": "cls.predictions.transform.dense.weight",
        "next_sentence": "cls.seq_relationship.weight",
    }
    outputs = tuple(output for output, mark in marks.items() if mark in there)
    return dataclasses.replace(config, outputs=outputs, head_bias="masked_language" in outputs)


_BERT_LAYER = "bert.encoder.layer.{}."
HUGGING_FACE_BERT = Family(
    "a Hugging Face BERT",
    {
        "embedding": ("bert.embeddings.word_embeddings",),
        "position_embedding": ("bert.embeddings.position_embeddings",),
        "token_type_embedding": ("bert.embeddings.token_type_embeddings",),
        "embedding_norm": ("bert.embeddings.LayerNorm",),
        "blocks.{}.attention.qkv": (
            _BERT_LAYER + "attention.self.query",
            _BERT_LAYER + "attention.self.key",
            _BERT_LAYER + "attention.self.value",
        ),
        "blocks.{}.attention.output": (_BERT_LAYER + "attention.output.dense",),
        "blocks.{}.attention_norm": (_BERT_LAYER + "attention.output.LayerNorm",),
        "blocks.{}.feed_forward.up": (_BERT_LAYER + "intermediate.dense",),
        "blocks.{}.feed_forward.down": (_BERT_LAYER + "output.dense",),
        "blocks.{}.feed_forward_norm": (_BERT_LAYER + "output.LayerNorm",),
        "pooler": ("bert.pooler.dense",),
        "masked_language_head.dense": ("cls.predictions.transform.dense",),
        "masked_language_head.norm": ("cls.predictions.transform.LayerNorm",),
        "head": ("cls.predictions.decoder",),
        "head_bias": ("cls.predictions.bias",),
        "next_sentence_head": ("cls.seq_relationship",),
    },
    model=Encoder,
    prefix="bert.",
    ignored=r"bert\.embeddings\.position_ids|cls\.predictions\.decoder\.bias",
    kind="bert",
    stock="BertForPreTraining",
    keys={
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "feed_forward": "intermediate_size",
        "context_length": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "token_types": "type_vocab_size",
        "tied_embeddings": "tie_word_embeddings",
    },
    defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True},
    fixed={
        "norm": "layer_norm",
        "norm_placement": "post",
        "positions": "learned",
        "bias": True,
        "embedding_norm": True,
    },
    required={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        **_PLAIN,
    },
    read=_read_bert,
    write=_write_bert,
    parts=_bert_parts,
)

# ------------------------------------------------------------------------------------ Marian and T5


def _same(found: Found, *keys: str) -> Any:
    """The value that these keys share; ValueError when they differ."""
    first, *others = (found.get(key) for key in keys)
    if any(other not in (None, first) for other in others):
        raise ValueError(f"{' and '.join(keys)} in config.json: accepted are equal ones")
    return first


def _read_marian(found: Found) -> dict[str, Any]:
    heads = _same(found, "encoder_attention_heads", "decoder_attention_heads")
    activation = found.get("activation_function", "gelu")
    return {
        **_multi_head(heads, found["d_model"]),
        "heads": heads,
        "layers": _same(found, "encoder_layers", "decoder_layers"),
        "feed_forward": _same(found, "encoder_ffn_dim", "decoder_ffn_dim"),
        "activation": _choose(activation, _ACTIVATIONS, "activation_function"),
        "embedding_scale": found["d_model"] ** 0.5 if found.get("scale_embedding") else 1.0,
    }


def _write_marian(config: TransformerConfig) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        **{f"{side}_layers": config.layers for side in sides},
        **{f"{side}_attention_heads": config.heads for side in sides},
        **{f"{side}_ffn_dim": config.feed_forward for side in sides},
        "decoder_vocab_size": config.vocab_size,
        "activation_function": _inverse(_ACTIVATIONS, config.activation),
        "scale_embedding": config.embedding_scale != 1.0,
        "pad_token_id": config.start_id,  # as in all of theirs
        # Their search forces this token at the last step; ours forces none.
        "forced_eos_token_id": None,
    }


def _marian_side(side: str) -> dict[str, tuple[str, ...]]:
    ours, theirs = f"{side}.blocks.{{}}.", f"model.{side}.layers.{{}}."
    return {
        ours + "attention.qkv": tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv"),
        ours + "attention.output": (theirs + "self_attn.out_proj",),
        ours + "attention_norm": (theirs + "self_attn_layer_norm",),
        ours + "cross_attention.q": (theirs + "encoder_attn.q_proj",),
        ours + "cross_attention.kv": tuple(f"{theirs}encoder_attn.{x}_proj" for x in "kv"),
        ours + "cross_attention.output": (theirs + "encoder_attn.out_proj",),
        ours + "cross_attention_norm": (theirs + "encoder_attn_layer_norm",),
        ours + "feed_forward.up": (theirs + "fc1",),
        ours + "feed_forward.down": (theirs + "fc2",),
        ours + "feed_forward_norm": (theirs + "final_layer_norm",),
    }


HUGGING_FACE_MARIAN = Family(
    "a Hugging Face Marian",
    {
        "decoder.embedding": ("model.shared",),
        **_marian_side("encoder"),
        **_marian_side("decoder"),
        "decoder.head": ("lm_head",),
        "decoder.head_bias": ("final_logits_bias",),
    },
    model=EncoderDecoder,
    unsqueezed=("final_logits_bias",),
    ignored=r"model\.(encoder|decoder)\.embed_(positions|tokens)\.weight",
    kind="marian",
    stock="MarianMTModel",
    keys={
        "vocab_size": "vocab_size",
        "width": "d_model",
        "context_length": "max_position_embeddings",
        "start_id": "decoder_start_token_id",
        "tied_embeddings": "tie_word_embeddings",
    },
    defaults={"tie_word_embeddings": True},
    fixed={
        "norm": "layer_norm",
        "norm_placement": "post",
        "positions": "sinusoidal",
        "bias": True,
        "head_bias": True,
    },
    required={"share_encoder_decoder_embeddings": True, "static_position_embeddings": True, **_PLAIN},
    read=_read_marian,
    write=_write_marian,
)

_T5_FORMS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def _read_t5(found: Found) -> dict[str, Any]:
    tied, width = found.get("tie_word_embeddings", True), found["d_model"]
    scaled = found.get("scale_decoder_outputs", tied)
    form = found.get("feed_forward_proj", "relu")
    return {
        "kv_heads": found["num_heads"],
        "layers": _same(found, "num_layers", "num_decoder_layers"),
        "context_length": found.get("n_positions", 512),
        "activation": _choose(form, _T5_FORMS, "feed_forward_proj"),
        "tied_embeddings": tied,
        "logit_scale": width**-0.5 if scaled else 1.0,
        "start_id": found.get("decoder_start_token_id", found.get("pad_token_id", 0)),
    }


def _write_t5(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "n_positions": config.context_length,
        "feed_forward_proj": _inverse(_T5_FORMS, config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1.0,
        "decoder_start_token_id": config.start_id,
    }


def _t5_side(side: str, up: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    ours, theirs = f"{side}.blocks.{{}}.", f"{side}.block.{{}}.layer."
    last = 1 if side == "encoder" else 2
    own, cross = f"{theirs}0.SelfAttention.", f"{theirs}1.EncDecAttention."
    return {
        f"{side}.relative.embedding": (
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
        ours + "attention.qkv": (own + "q", own + "k", own + "v"),
        ours + "attention.output": (own + "o",),
        ours + "attention_norm": (theirs + "0.layer_norm",),
        ours + "cross_attention.q": (cross + "q",),
        ours + "cross_attention.kv": (cross + "k", cross + "v"),
        ours + "cross_attention.output": (cross + "o",),
        ours + "cross_attention_norm": (theirs + "1.layer_norm",),
        ours + "feed_forward.up": tuple(f"{theirs}{last}.DenseReluDense.{name}" for name in up),
        ours + "feed_forward.down": (f"{theirs}{last}.DenseReluDense.wo",),
        ours + "feed_forward_norm": (f"{theirs}{last}.layer_norm",),
        f"{side}.norm": (f"{side}.final_layer_norm",),
    }


def _t5(up: tuple[str, ...], forms: dict[str, str]) -> Family:
    """T5 with these matrices in front of the activation; feed_forward_proj has these forms."""
    return Family(
        "a Hugging Face T5",
        {
            "decoder.embedding": ("shared",),
            **_t5_side("encoder", up),
            **_t5_side("decoder", up),
            "decoder.head": ("lm_head",),
        },
        model=EncoderDecoder,
        ignored=r"(encoder|decoder)\.embed_tokens\.weight",
        kind="t5",
        stock="T5ForConditionalGeneration",
        keys={
            "vocab_size": "vocab_size",
            "width": "d_model",
            "heads": "num_heads",
            "head_width": "d_kv",
            "feed_forward": "d_ff",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"layer_norm_epsilon": 1e-6},
        fixed={"positions": "relative", "attention_scale": 1.0},
        required={
            "feed_forward_proj": tuple(forms),
            "relative_attention_num_buckets": BUCKETS,
            "relative_attention_max_distance": FAR,
            **_PLAIN,
        },
        read=_read_t5,
        write=_write_t5,
    )


HUGGING_FACE_T5 = _t5(("wi",), {"relu": "relu"})
HUGGING_FACE_T5_GATED = _t5(("wi_0", "wi_1"), {"gated-gelu": "geglu", "gated-silu": "swiglu"})

# ---------------------------------------------------------------------------------- the other tables

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

# Our own names, of each kind of model.
LLMCORE = Family("an llmcore", kind="llmcore_decoder")
LLMCORE_ENCODER = Family("an llmcore", model=Encoder, kind="llmcore_encoder")
LLMCORE_ENCODER_DECODER = Family(
    "an llmcore", model=EncoderDecoder, kind="llmcore_encoder_decoder"
)

OURS = (LLMCORE, LLMCORE_ENCODER, LLMCORE_ENCODER_DECODER)
HUGGING_FACE = (
    HUGGING_FACE_LLAMA,
    HUGGING_FACE_MISTRAL,
    HUGGING_FACE_MIXTRAL,
    HUGGING_FACE_QWEN2,
    HUGGING_FACE_QWEN3,
    HUGGING_FACE_GEMMA,
    HUGGING_FACE_GEMMA2,
    HUGGING_FACE_GEMMA3,
    HUGGING_FACE_GPT2,
    HUGGING_FACE_BERT,
    HUGGING_FACE_MARIAN,
    HUGGING_FACE_T5,
    HUGGING_FACE_T5_GATED,
)
