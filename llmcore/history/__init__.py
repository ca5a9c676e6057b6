"""Language models from before transformers: counted n-grams, and recurrent networks."""

from llmcore.history.ngram import Ngram
from llmcore.history.recurrent import Recurrent, RecurrentConfig

__all__ = ["Ngram", "Recurrent", "RecurrentConfig"]
