"""The thin transformer: models, their cache, and their weights in and out."""

from llmcore.models.cache import KVCache
from llmcore.models.config import TransformerConfig
from llmcore.models.files import load, save
from llmcore.models.paged_cache import PagedKVCache
from llmcore.models.sentences import embed, pool
from llmcore.models.transformer import Decoder, Encoder, EncoderDecoder

__all__ = [
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "KVCache",
    "PagedKVCache",
    "TransformerConfig",
    "embed",
    "load",
    "pool",
    "save",
]
