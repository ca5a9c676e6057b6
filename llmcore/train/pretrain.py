"""Pre-training from text to a model: presets, the three objectives, and what to compare with.

run/data/         what llmcore.train.preparation made
run/checkpoints/  where the run stands: the same command goes on from there
run/model/        the result, for llmcore.models.load
run/metrics.jsonl, run/loss.png
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from llmcore.evaluate import Likelihood, evaluate
from llmcore.history import Ngram, Recurrent, RecurrentConfig
from llmcore.history.ngram import NgramConfig
from llmcore.history.recurrent import Kind
from llmcore.models import Decoder, Encoder, TransformerConfig, save
from llmcore.models.files import describe
from llmcore.text import Tokenizer, masking
from llmcore.text.data import Packed
from llmcore.text.masking import MaskedPairs
from llmcore.train.loop import Trainer, Validation
from llmcore.train.metrics import clock
from llmcore.train.objectives import CausalLM, MaskedLM
from llmcore.train.preparation import Preparation, Prepared
from llmcore.train.processes import Processes
from llmcore.train.recipe import Recipe

Objective = Literal["causal", "masked"]
VALIDATION_BATCHES = 8
NGRAM_ORDERS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Preset:
    """One whole pre-training run.

    shape   of the transformer: TransformerConfig's fields, but the vocabulary's
    length  tokens of a row, rows of a batch
    """

    preparation: Preparation
    shape: dict[str, Any]
    recipe: Recipe
    length: int
    rows: int
    objective: Objective = "causal"
    recurrent_width: int = 256
    about: str = ""

    @property
    def tokens(self) -> int:
        """Read in the whole run, where no row has padding."""
        return self.recipe.steps * self.recipe.accumulate * self.rows * self.length


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which changes no result but by rounding."""

    validate_every: int = 100
    checkpoint_every: int = 100
    recompute: bool = False
    quiet: bool = False
    tensorboard: bool = False
    processes: Processes = field(default_factory=Processes)


def model_config(preset: Preset, tokenizer: Tokenizer) -> TransformerConfig:
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return TransformerConfig(
        vocab_size=len(tokenizer), context_length=preset.length, eos_ids=end, **preset.shape
    )


def pretrain(preset: Preset, prepared: Prepared, folder: Path, options: Options) -> nn.Module:
    """Train the preset's model, or go on with it; it is saved in folder/model.

    Errors are Trainer.run's.
    """
    torch.manual_seed(preset.recipe.seed)
    config = model_config(preset, prepared.tokenizer)
    objective: nn.Module
    training: Any
    validation: Any
    if preset.objective == "masked":
        model: Any = Encoder(config)
        objective = MaskedLM(model)
        rows = {"length": preset.length, "rows": preset.rows}
        training = MaskedPairs(prepared.training, prepared.tokenizer, **rows)
        validation = MaskedPairs(prepared.validation, prepared.tokenizer, **rows)
    else:
        model = Decoder(config)
        objective = CausalLM(model)
        training, validation = packed(preset, prepared)
    model.checkpoint_blocks = options.recompute
    trainer = Trainer(
        objective,
        training,
        preset.recipe,
        folder,
        validation=validation_of(validation, options.validate_every),
        checkpoint_every=options.checkpoint_every,
        describe=partial(describe, model, prepared.tokenizer),
        processes=options.processes,
        quiet=options.quiet,
        tensorboard=options.tensorboard,
    )
    trainer.run()
    if options.processes.count == 1:
        save(model, prepared.tokenizer, folder / "model")
    return model


def packed(preset: Preset, prepared: Prepared) -> tuple[Packed, Packed]:
    """Training and validation batches of packed documents."""
    seed = preset.recipe.seed
    return (
        Packed(prepared.training, preset.length, preset.rows, seed),
        Packed(prepared.validation, preset.length, preset.rows, seed),
    )


def validation_of(data: Any, every: int) -> Validation:
    return Validation(data, max(1, min(VALIDATION_BATCHES, data.batches)), every)


@dataclass(frozen=True)
class Rival:
    """A language model and how well it predicts the held-out documents."""

    name: str
    bits_per_byte: float
    nats_per_token: float
    parameters: int
    tokens: int
    seconds: float


def judge(name: str, model: nn.Module, prepared: Prepared, *, tokens: int, seconds: float) -> Rival:
    """Bits per byte over all held-out documents, each from its beginning; tokens, seconds: what
    it took to make the model."""
    found = Likelihood()
    for document in prepared.validation_documents():
        found += evaluate(model, prepared.tokenizer, document)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    nats = found.nats / found.tokens
    return Rival(name, found.bits_per_byte, nats, parameters, tokens, seconds)


def ngrams(prepared: Prepared, orders: Sequence[int] = NGRAM_ORDERS) -> list[Rival]:
    """The n-grams of these orders, counted in the whole training part."""
    tokens = prepared.training.read(0, len(prepared.training))
    rivals = []
    for order in orders:
        start = time.perf_counter()
        config = NgramConfig(order, len(prepared.tokenizer), prepared.tokenizer.eos_id or 0)
        model = Ngram(config, np.asarray(tokens))
        seconds = time.perf_counter() - start
        name = f"{order}-gram, Kneser-Ney"
        rivals.append(judge(name, model, prepared, tokens=len(tokens), seconds=seconds))
    return rivals


def recurrent(
    kind: Kind,
    preset: Preset,
    prepared: Prepared,
    folder: Path,
    options: Options,
) -> Rival:
    """A recurrent network, trained on the same batches with the same recipe."""
    torch.manual_seed(preset.recipe.seed)
    forget_bias = 1.0 if kind == "lstm" else 0.0
    model = Recurrent(
        RecurrentConfig(
            kind, len(prepared.tokenizer), preset.recurrent_width, forget_bias=forget_bias
        )
    )
    training, validation = packed(preset, prepared)
    trainer = Trainer(
        CausalLM(model),
        training,
        preset.recipe,
        folder / kind,
        validation=validation_of(validation, options.validate_every),
        checkpoint_every=options.checkpoint_every,
        quiet=options.quiet,
    )
    trainer.run()
    seconds = trainer.seconds
    return judge(kind.upper(), model, prepared, tokens=trainer.tokens, seconds=seconds)


def rivals_table(rivals: Sequence[Rival]) -> Iterator[str]:
    """All by bits per byte of the held-out documents, the best first."""
    ranked = sorted(rivals, key=lambda rival: rival.bits_per_byte)
    yield f"\n{'':<22}{'bits/byte':>10}{'parameters':>12}{'tokens read':>13}{'time':>8}"
    for rival in ranked:
        parameters = f"{rival.parameters:,}" if rival.parameters else "-"
        yield (
            f"{rival.name:<22}{rival.bits_per_byte:>10.3f}{parameters:>12}"
            f"{rival.tokens:>13,}{clock(rival.seconds):>8}"
        )
    yield f"\nThe best here: {ranked[0].name}."


@torch.no_grad()
def masked_accuracy(model: Encoder, data: MaskedPairs, batches: int) -> tuple[float, float]:
    """Shares of hidden tokens, and of pairs, that are told right."""
    told, tokens, pairs, rows = 0, 0, 0, 0
    for position in range(batches):
        inputs = data.batch(position).inputs
        hidden = model(inputs["ids"], inputs["attention_mask"], inputs["token_types"])
        chosen = inputs["targets"] >= 0
        found = model.masked_language(hidden[chosen]).argmax(dim=-1)
        told += int((found == inputs["targets"][chosen]).sum())
        tokens += int(chosen.sum())
        pairs += int((model.next_sentence(hidden).argmax(dim=-1) == inputs["is_next"]).sum())
        rows += len(hidden)
    return told / tokens, pairs / rows


BERT_SHAPE = {
    "norm": "layer_norm",
    "norm_placement": "post",
    "activation": "gelu",
    "positions": "learned",
    "bias": True,
    "embedding_norm": True,
    "head_bias": True,
    "token_types": 2,
    "outputs": ("pooler", "masked_language", "next_sentence"),
}

TINY_SHAPE: dict[str, Any] = {
    "width": 192,
    "layers": 4,
    "heads": 3,
    "kv_heads": 3,
    "head_width": 64,
}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        Preparation(("bible",)),
        TINY_SHAPE | {"feed_forward": 512},
        Recipe(steps=300, learning_rate=4e-3, warm_up=40),
        length=256,
        rows=16,
        about="a decoder of 2.2M parameters on the Bible, about five minutes on two cores",
    ),
    "tiny-masked": Preset(
        Preparation(("bible",), special=masking.SPECIAL),
        TINY_SHAPE | BERT_SHAPE | {"feed_forward": 768},
        Recipe(steps=600, learning_rate=1e-3, warm_up=60),
        length=128,
        rows=32,
        objective="masked",
        about="BERT's shape and tasks on the Bible, about five minutes on two cores",
    ),
    "smoke": Preset(
        Preparation(("pydoc",), vocab_size=512, held_out=0.1),
        {
            "width": 64,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "head_width": 32,
            "feed_forward": 128,
        },
        Recipe(steps=20, learning_rate=3e-3, warm_up=5),
        length=64,
        rows=8,
        recurrent_width=64,
        about="seconds, on Python's own reference: whether everything works",
    ),
}


def changed(preset: Preset, *, recipe: dict[str, Any], **changes: Any) -> Preset:
    """The preset with other settings, those of its recipe among them."""
    return dataclasses.replace(
        preset, recipe=dataclasses.replace(preset.recipe, **recipe), **changes
    )
