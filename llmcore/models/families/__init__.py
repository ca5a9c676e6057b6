"""The families of models that other libraries write, one table each, read in both directions.

`modules` maps a module of ours to the modules whose rows, one below the other, are its own: Hugging
Face keeps queries, keys and values apart, we don't. `{}` is a number: of the layer, of the expert.
`keys` maps a field of our config to its key in their config.json; what is no plain copy stands in
`read` and `write`.
"""

from llmcore.models.families.base import Family, Model
from llmcore.models.families.bert import HUGGING_FACE_BERT
from llmcore.models.families.gemma import (
    HUGGING_FACE_GEMMA,
    HUGGING_FACE_GEMMA2,
    HUGGING_FACE_GEMMA3,
)
from llmcore.models.families.gpt2 import HUGGING_FACE_GPT2
from llmcore.models.families.llama import (
    GGUF_LLAMA,
    HUGGING_FACE_LLAMA,
    HUGGING_FACE_MISTRAL,
    HUGGING_FACE_MIXTRAL,
    HUGGING_FACE_QWEN2,
    HUGGING_FACE_QWEN3,
)
from llmcore.models.families.translation import (
    HUGGING_FACE_MARIAN,
    HUGGING_FACE_T5,
    HUGGING_FACE_T5_GATED,
)
from llmcore.models.transformer import Encoder, EncoderDecoder

# Our own names, of each kind of model.
LLMCORE = Family("an llmcore", kind="llmcore_decoder")
LLMCORE_ENCODER = Family("an llmcore", model=Encoder, kind="llmcore_encoder")
LLMCORE_ENCODER_DECODER = Family("an llmcore", model=EncoderDecoder, kind="llmcore_encoder_decoder")

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

__all__ = [
    "GGUF_LLAMA",
    "HUGGING_FACE",
    "HUGGING_FACE_BERT",
    "HUGGING_FACE_GEMMA",
    "HUGGING_FACE_GEMMA2",
    "HUGGING_FACE_GEMMA3",
    "HUGGING_FACE_GPT2",
    "HUGGING_FACE_LLAMA",
    "HUGGING_FACE_MARIAN",
    "HUGGING_FACE_MISTRAL",
    "HUGGING_FACE_MIXTRAL",
    "HUGGING_FACE_QWEN2",
    "HUGGING_FACE_QWEN3",
    "HUGGING_FACE_T5",
    "HUGGING_FACE_T5_GATED",
    "LLMCORE",
    "LLMCORE_ENCODER",
    "LLMCORE_ENCODER_DECODER",
    "OURS",
    "Family",
    "Model",
]
