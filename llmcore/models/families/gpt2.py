"""GPT-2."""

from typing import Any

from llmcore.models.config import TransformerConfig
from llmcore.models.families.base import (
    ACTIVATIONS,
    PLAIN,
    Family,
    Found,
    choose,
    inverse,
    multi_head,
)


def _read_gpt2(found: Found) -> dict[str, Any]:
    activation = found.get("activation_function", "gelu_new")
    return {
        **multi_head(found["n_head"], found["n_embd"]),
        "feed_forward": found.get("n_inner") or 4 * found["n_embd"],
        "activation": choose(activation, ACTIVATIONS, "activation_function"),
    }


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    activation = inverse(ACTIVATIONS, config.activation)
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
        **PLAIN,
    },
    read=_read_gpt2,
    write=_write_gpt2,
)
