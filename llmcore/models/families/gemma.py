"""Gemma, 1 to 3."""

from typing import Any

from llmcore.models.config import TransformerConfig
from llmcore.models.families.base import PLAIN, Family, Found
from llmcore.models.families.llama import (
    LLAMA_KEYS,
    LLAMA_MODULES,
    QK_NORMS,
    read_llama,
    rope_theta,
    write_llama,
)

_GEMMA_FIXED = {"norm_offset": True}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
_GEMMA_REQUIRED = {**PLAIN, "attention_bias": False, "use_bidirectional_attention": (None, False)}
_SANDWICH = {
    "blocks.{}.attention_after_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.feed_forward_norm": ("model.layers.{}.pre_feedforward_layernorm",),
    "blocks.{}.feed_forward_after_norm": ("model.layers.{}.post_feedforward_layernorm",),
}


def _read_gemma(found: Found) -> dict[str, Any]:
    activation = found.get("hidden_activation") or found.get("hidden_act", "gelu_pytorch_tanh")
    shape = read_llama({**found, "hidden_act": activation, "rope_parameters": None})
    return {**shape, "embedding_scale": found["hidden_size"] ** 0.5}


def _read_gemma1(found: Found) -> dict[str, Any]:
    return {**_read_gemma(found), "rope_theta": rope_theta(found)}


HUGGING_FACE_GEMMA = Family(
    "a Hugging Face Gemma",
    LLAMA_MODULES,
    kind="gemma",
    stock="GemmaForCausalLM",
    keys=LLAMA_KEYS,
    defaults=_GEMMA_DEFAULTS,
    fixed=_GEMMA_FIXED,
    required=_GEMMA_REQUIRED,
    read=_read_gemma1,
    write=write_llama,
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
    shape = write_llama(config)
    activation = shape.pop("hidden_act")
    return {
        **shape,
        "hidden_activation": activation,
        **_write_layers(config),
        **_write_scores(config),
    }


HUGGING_FACE_GEMMA2 = Family(
    "a Hugging Face Gemma 2",
    {**LLAMA_MODULES, **_SANDWICH},
    kind="gemma2",
    stock="Gemma2ForCausalLM",
    keys=LLAMA_KEYS,
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
        rope_theta({"rope_parameters": ropes[f"{kind}_attention"]}) for kind in ("full", "sliding")
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
    {**LLAMA_MODULES, **_SANDWICH, **QK_NORMS},
    kind="gemma3_text",
    stock="Gemma3ForCausalLM",
    keys=LLAMA_KEYS,
    defaults=_GEMMA_DEFAULTS,
    fixed={**_GEMMA_FIXED, "norm_placement": "both", "qk_norm": True},
    required=_GEMMA_REQUIRED,
    read=_read_gemma3,
    write=_write_gemma3,
)
