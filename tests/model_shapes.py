"""Small configs of every family, as changes to conftest's TINY."""

from llmcore.models import Decoder, Encoder, EncoderDecoder

WIDTH = 32
GEMMA = {
    "activation": "geglu",
    "norm_offset": True,
    "embedding_scale": WIDTH**0.5,
    "norm_eps": 1e-6,
}
GEMMA2 = {
    **GEMMA,
    "norm_placement": "both",
    "window": 9,
    "full_every": 2,
    "attention_scale": 0.25,
    "attention_softcap": 20.0,
    "logit_softcap": 12.0,
}
BERT = {
    "kv_heads": 4,
    "norm": "layer_norm",
    "norm_placement": "post",
    "activation": "gelu",
    "positions": "learned",
    "bias": True,
    "embedding_norm": True,
    "token_types": 2,
    "eos_ids": (),
}
MARIAN = {
    "kv_heads": 4,
    "norm": "layer_norm",
    "norm_placement": "post",
    "activation": "silu",
    "positions": "sinusoidal",
    "bias": True,
    "head_bias": True,
    "embedding_scale": WIDTH**0.5,
    "start_id": 0,
}
T5 = {
    "kv_heads": 4,
    "head_width": 12,
    "norm_eps": 1e-6,
    "activation": "relu",
    "positions": "relative",
    "attention_scale": 1.0,
    "logit_scale": WIDTH**-0.5,
    "start_id": 0,
    "context_length": 512,
}

FAMILIES = {
    "llama": (Decoder, {}),
    "llama_bias": (Decoder, {"bias": True, "tied_embeddings": False}),
    "mistral": (Decoder, {"window": 9}),
    "mixtral": (Decoder, {"experts": 4, "experts_per_token": 2, "window": 9}),
    "qwen2": (Decoder, {"qkv_bias": True}),
    "qwen3": (Decoder, {"qk_norm": True, "head_width": 12}),
    "gemma": (Decoder, GEMMA),
    "gemma2": (Decoder, GEMMA2),
    "gemma3": (
        Decoder,
        {
            **GEMMA,
            "norm_placement": "both",
            "window": 9,
            "full_every": 3,
            "layers": 4,
            "qk_norm": True,
            "rope_theta": 1e6,
            "window_rope_theta": 1e4,
        },
    ),
    "gpt2": (
        Decoder,
        {
            "kv_heads": 4,
            "norm": "layer_norm",
            "activation": "gelu_tanh",
            "positions": "learned",
            "bias": True,
        },
    ),
    "bert": (
        Encoder,
        {
            **BERT,
            "outputs": ("pooler", "masked_language", "next_sentence"),
            "head_bias": True,
        },
    ),
    "marian": (EncoderDecoder, MARIAN),
    "t5": (EncoderDecoder, T5),
    "t5_gated": (EncoderDecoder, {**T5, "activation": "geglu", "logit_scale": 1.0}),
}
