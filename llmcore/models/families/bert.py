"""BERT, and what has its shape."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from llmcore.models.config import Output, TransformerConfig
from llmcore.models.families.base import (
    ACTIVATIONS,
    PLAIN,
    Family,
    Found,
    choose,
    inverse,
    multi_head,
)
from llmcore.models.transformer import Encoder


def _read_bert(found: Found) -> dict[str, Any]:
    return {
        **multi_head(found["num_attention_heads"], found["hidden_size"]),
        "activation": choose(found.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act"),
    }


def _write_bert(config: TransformerConfig) -> dict[str, Any]:
    return {"hidden_act": inverse(ACTIVATIONS, config.activation)}


def _bert_parts(config: TransformerConfig, names: Iterable[str]) -> TransformerConfig:
    there = set(names)
    marks: dict[Output, str] = {
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
    stock={
        ("pooler",): "BertModel",
        ("masked_language",): "BertForMaskedLM",
        ("pooler", "next_sentence"): "BertForNextSentencePrediction",
        ("pooler", "masked_language", "next_sentence"): "BertForPreTraining",
    },
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
        **PLAIN,
    },
    read=_read_bert,
    write=_write_bert,
    parts=_bert_parts,
)
