"""Encoder-decoders: Marian and T5."""

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
from llmcore.models.positions import BUCKETS, FAR
from llmcore.models.transformer import EncoderDecoder


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
        **multi_head(heads, found["d_model"]),
        "heads": heads,
        "layers": _same(found, "encoder_layers", "decoder_layers"),
        "feed_forward": _same(found, "encoder_ffn_dim", "decoder_ffn_dim"),
        "activation": choose(activation, ACTIVATIONS, "activation_function"),
        "embedding_scale": found["d_model"] ** 0.5 if found.get("scale_embedding") else 1.0,
    }


def _write_marian(config: TransformerConfig) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        **{f"{side}_layers": config.layers for side in sides},
        **{f"{side}_attention_heads": config.heads for side in sides},
        **{f"{side}_ffn_dim": config.feed_forward for side in sides},
        "decoder_vocab_size": config.vocab_size,
        "activation_function": inverse(ACTIVATIONS, config.activation),
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
    required={
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
        **PLAIN,
    },
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
        "activation": choose(form, _T5_FORMS, "feed_forward_proj"),
        "tied_embeddings": tied,
        "logit_scale": width**-0.5 if scaled else 1.0,
        "start_id": found.get("decoder_start_token_id", found.get("pad_token_id", 0)),
    }


def _write_t5(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "n_positions": config.context_length,
        "feed_forward_proj": inverse(_T5_FORMS, config.activation),
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
            **PLAIN,
        },
        read=_read_t5,
        write=_write_t5,
    )


HUGGING_FACE_T5 = _t5(("wi",), {"relu": "relu"})
HUGGING_FACE_T5_GATED = _t5(("wi_0", "wi_1"), {"gated-gelu": "geglu", "gated-silu": "swiglu"})
