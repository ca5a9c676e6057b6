"""A small run that several files start: a recurrent network learns Python's reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from llmcore.history import Recurrent, RecurrentConfig
from llmcore.text import corpora, vocabulary
from llmcore.text.data import Batch, Packed
from llmcore.text.shards import write_shards
from llmcore.train import CausalLM, Recipe, Trainer, Validation

RECIPE = {"steps": 8, "learning_rate": 1e-2, "warm_up": 2, "accumulate": 2, "average": 0.5}


def small_model() -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(RecurrentConfig("gru", 257, 16))


def small_data(folder: Path) -> Packed:
    tokenizer = vocabulary.byte_tokenizer()
    texts = [text[:300] for text in corpora.documents("pydoc")]
    return Packed(write_shards(folder / "data", texts, tokenizer), length=24, rows=3)


def small_trainer(folder: Path, data: Any, **changes: Any) -> Trainer:
    recipe = Recipe(**{**RECIPE, **changes.pop("recipe", {})})
    model = changes.pop("model", None) or small_model()
    return Trainer(CausalLM(model), data, recipe, folder, quiet=True, **changes)


class Stopping:
    """Data that raise what they are given at the n-th batch that is asked for."""

    def __init__(self, data: Any, after: int, error: BaseException) -> None:
        self.data, self.after, self.error = data, after, error
        self.asked = itertools.count()

    def batch(self, position: int) -> Batch:
        if next(self.asked) == self.after:
            raise self.error
        return self.data.batch(position)


def validation(data: Packed) -> Validation:
    return Validation(data, 3, every=4)
