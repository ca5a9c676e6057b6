"""Tiny models of Hugging Face's families with random weights, and inputs for them."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch

import llmcore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)
"""What this version's models call their cache."""

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {name: size for name, size in DECODER.items() if name != "num_key_value_heads"}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
BOTH = {
    **SPECIAL,
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention"]

DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": 1.5,
            "query_pre_attn_scalar": 8,
            "layer_types": ALTERNATING,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 8, "sliding_window": 5, "layer_types": ALTERNATING},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ALTERNATING,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            **SPECIAL,
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", PLAIN),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", DECODER),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **ENCODER,
            **SPECIAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
        },
    ),
}
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **SPECIAL,
            "vocab_size": 96,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BOTH),
    "marian": ("MarianConfig", "MarianMTModel", BOTH),
}
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**ENCODER, "image_size": 32, "patch_size": 8},
    ),
    "clip": (
        "CLIPVisionConfig",
        "CLIPVisionModel",
        {**PLAIN, "image_size": 32, "patch_size": 8},
    ),
}
AUDIO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **BOTH,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
MORE_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox_in_turn": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**PLAIN, "use_parallel_residual": False},
    ),
    "stablelm": (
        "StableLmConfig",
        "StableLmForCausalLM",
        {**DECODER, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DECODER),
}
"""Structures that the families above don't have, for the tests that name them."""
TEXT = {**DECODERS, **ENCODERS, **SEQ2SEQ}
EVERY = {**TEXT, **MORE_DECODERS, **VISION, **AUDIO}


@functools.cache
def _built(family: str) -> torch.nn.Module:
    config, model, sizes = EVERY[family]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    return with_large_weights(built)


def with_large_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that scores differ, and with them what a wrong mask or factor gives."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def build(family: str, implementation: str = "eager") -> Any:
    """A tiny model of a family, in eval mode; every call gives a new one with the same weights."""
    model: Any = copy.deepcopy(_built(family))
    model.set_attn_implementation(implementation)
    return model


def padding(kind: str, rows: int = 3, length: int = 11) -> torch.Tensor | None:
    """An attention_mask (B, length), the first row without padding; None for "none"."""
    if kind == "none":
        return None
    lengths = torch.tensor([length, length - 4, 3])[:rows, None]
    place = torch.arange(length)
    if kind == "left":
        place = place.flip(0)
    return (place < lengths).long()


def inputs(family: str, kind: str = "none", length: int = 11, seed: int = 2) -> dict[str, Any]:
    """The arguments of a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    if family in VISION:
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    decoder_ids = torch.randint(3, 96, (3, 7), generator=generator)
    if family in AUDIO:
        sound = torch.randn(3, 8, 32, generator=generator)
        return {"input_features": sound, "decoder_input_ids": decoder_ids}
    ids = torch.randint(3, 96, (3, length), generator=generator)
    arguments: dict[str, Any] = {"input_ids": ids}
    mask = padding(kind, length=length)
    if mask is not None:
        arguments["attention_mask"] = mask
    if family in SEQ2SEQ:
        arguments["decoder_input_ids"] = decoder_ids
    return arguments


def valid(logits: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The logits (N, V) at positions that are no padding."""
    mask = arguments.get("attention_mask")
    if logits.ndim == 2:
        return logits
    if mask is None or "decoder_input_ids" in arguments:
        return logits.flatten(0, 1)
    return logits[mask.bool()]


def prepared(model: Any, how: str) -> Any:
    """The model on llmcore, by its attention alone or as a whole."""
    if how == "attention":
        model.set_attn_implementation("llmcore")
    else:
        llmcore.accelerate(model)
    return model


def word_tokenizer():
    """Words of one vocabulary, by transformers' own class."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(92))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


STOCK = {"gemma2": "eager", "gpt_oss": "eager", "t5": "eager"}
"""What a family's own attention is, where it isn't sdpa."""


def stock(family: str):
    return build(family, STOCK.get(family, "sdpa"))


def passes(model) -> int:
    return model._llmcore_passes.count
