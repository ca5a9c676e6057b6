"""Llama and its relatives: Mistral, Mixtral, Qwen2, Qwen3."""

from typing import Any

from llmcore.models.config import TransformerConfig
from llmcore.models.families.base import PLAIN, Family, Found, choose, inverse

LLAMA_MODULES = {
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
QK_NORMS = {
    "blocks.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "blocks.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
}
LLAMA_KEYS = {
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
_GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def rope_theta(found: Found) -> float:
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} in config.json: accepted is 'default'")
    return float(rope.get("rope_theta") or found.get("rope_theta") or 10000.0)


def read_llama(found: Found) -> dict[str, Any]:
    heads = found["num_attention_heads"]
    return {
        "kv_heads": found.get("num_key_value_heads") or heads,
        "head_width": found.get("head_dim") or found["hidden_size"] // heads,
        "rope_theta": rope_theta(found),
        "activation": choose(found.get("hidden_act", "silu"), _GATED, "hidden_act"),
    }


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"hidden_act": inverse(_GATED, config.activation), "rope_parameters": rope}


def _read_llama_bias(found: Found) -> dict[str, Any]:
    bias = bool(found.get("attention_bias", False))
    if bool(found.get("mlp_bias", False)) != bias:
        raise ValueError(
            f"mlp_bias {not bias} beside attention_bias {bias} in config.json: accepted is {bias}"
        )
    return {**read_llama(found), "bias": bias}


def _write_llama_bias(config: TransformerConfig) -> dict[str, Any]:
    return {**write_llama(config), "attention_bias": config.bias, "mlp_bias": config.bias}


HUGGING_FACE_LLAMA = Family(
    "a Hugging Face Llama",
    LLAMA_MODULES,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    kind="llama",
    stock="LlamaForCausalLM",
    keys=LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    required=PLAIN,
    read=_read_llama_bias,
    write=_write_llama_bias,
)


def _read_window(found: Found) -> dict[str, Any]:
    return {**read_llama(found), "window": found.get("sliding_window")}


def _write_window(config: TransformerConfig) -> dict[str, Any]:
    return {**write_llama(config), "sliding_window": config.window}


HUGGING_FACE_MISTRAL = Family(
    "a Hugging Face Mistral",
    LLAMA_MODULES,
    kind="mistral",
    stock="MistralForCausalLM",
    keys=LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    required=PLAIN,
    read=_read_window,
    write=_write_window,
)

HUGGING_FACE_MIXTRAL = Family(
    "a Hugging Face Mixtral",
    {
        **{name: theirs for name, theirs in LLAMA_MODULES.items() if "feed_forward." not in name},
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
        **LLAMA_KEYS,
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    defaults={
        **_LLAMA_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    required=PLAIN,
    read=_read_window,
    write=_write_window,
)

_QWEN_REQUIRED = {**PLAIN, "use_sliding_window": False}

HUGGING_FACE_QWEN2 = Family(
    "a Hugging Face Qwen2",
    LLAMA_MODULES,
    kind="qwen2",
    stock="Qwen2ForCausalLM",
    keys=LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    fixed={"qkv_bias": True},
    required=_QWEN_REQUIRED,
    read=read_llama,
    write=write_llama,
)

HUGGING_FACE_QWEN3 = Family(
    "a Hugging Face Qwen3",
    {**LLAMA_MODULES, **QK_NORMS},
    kind="qwen3",
    stock="Qwen3ForCausalLM",
    keys=LLAMA_KEYS,
    defaults={**_LLAMA_DEFAULTS, "head_dim": 128},
    fixed={"qk_norm": True},
    required={**_QWEN_REQUIRED, "attention_bias": False},
    read=read_llama,
    write=write_llama,
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
