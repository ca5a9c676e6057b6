"""Translation: pairs of sentences to a model that translates (Vaswani et al. 2017).

Pages decide what is held out, not sentences: the sentences of one page are alike. And of what is
held out, only sentences that nobody has learned from are tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmcore.generate import generate
from llmcore.models import EncoderDecoder, TransformerConfig, save
from llmcore.models.files import describe
from llmcore.text import Tokenizer, cleaning, vocabulary
from llmcore.text.corpora import Pair
from llmcore.text.data import Translations
from llmcore.train.loop import Trainer, Validation
from llmcore.train.objectives import Translation
from llmcore.train.recipe import Recipe

START = "<|start|>"
TokenPairs = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Bitext:
    """Pairs to learn from, as ids and texts, and pairs to test with; one vocabulary for both."""

    tokenizer: Tokenizer
    training: TokenPairs
    tests: list[Pair]

    def encoded(self, pairs: Sequence[Pair]) -> TokenPairs:
        return _encoded(self.tokenizer, pairs)


def prepared_pairs(
    pairs: Sequence[Pair], *, vocab_size: int, held_out: float = 0.04, longest: int = 64
) -> Bitext:
    """Cleaned pairs, each once, split by page; pairs with more than `longest` tokens on a side are
    left out of both parts. ValueError when a part would be empty."""
    once = list(
        dict.fromkeys(
            Pair(pair.document, cleaning.clean(pair.source), cleaning.clean(pair.target))
            for pair in pairs
        )
    )
    sides: tuple[dict[tuple[str, str], Pair], dict[tuple[str, str], Pair]] = ({}, {})
    for pair in once:
        side = sides[cleaning.is_held_out(pair.document, held_out)]
        side.setdefault((pair.source, pair.target), pair)
    training = list(sides[0].values())
    learned = {pair.source for pair in training}
    tests = {p.source: p for p in sides[1].values() if p.source not in learned}
    if not training or not tests:
        raise ValueError(f"{len(once)} pairs are too few to hold out {held_out:.0%} of their pages")
    texts = [text for pair in training for text in (pair.source, pair.target)]
    tokenizer = vocabulary.train_bpe(texts, vocab_size, (vocabulary.END, START))
    encoded = _encoded(tokenizer, training)
    short = [(s, t) for s, t in encoded if max(len(s), len(t)) <= longest]
    kept = [
        pair
        for pair, (s, t) in zip(
            tests.values(), _encoded(tokenizer, list(tests.values())), strict=True
        )
        if max(len(s), len(t)) <= longest
    ]
    return Bitext(tokenizer, short, kept)


def _encoded(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> TokenPairs:
    return [(tokenizer.encode(pair.source), tokenizer.encode(pair.target)) for pair in pairs]


def translation_config(
    tokenizer: Tokenizer, *, width: int, layers: int, feed_forward: int, dropout: float = 0.1
) -> TransformerConfig:
    """The transformer of 2017, but for norms before each branch, which learn faster early on."""
    heads = max(1, width // 64)
    return TransformerConfig(
        vocab_size=len(tokenizer),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        feed_forward=feed_forward,
        context_length=256,
        norm="layer_norm",
        activation="relu",
        positions="sinusoidal",
        bias=True,
        embedding_scale=width**0.5,
        dropout=dropout,
        eos_ids=(tokenizer.special[vocabulary.END],),
        start_id=tokenizer.special[START],
    )


def train_translation(
    config: TransformerConfig,
    bitext: Bitext,
    recipe: Recipe,
    folder: Path,
    *,
    batch_tokens: int = 2048,
    label_smoothing: float = 0.1,
    validate_every: int = 0,
    checkpoint_every: int = 0,
    quiet: bool = False,
) -> EncoderDecoder:
    """A model of these pairs; it is saved in folder/model. Errors are Trainer.run's."""
    torch.manual_seed(recipe.seed)
    model = EncoderDecoder(config)

    def batches(pairs: TokenPairs) -> Translations:
        end, start = config.eos_ids[0], config.start_id
        assert start is not None
        return Translations(pairs, batch_tokens, start=start, end=end, pad=end, seed=recipe.seed)

    tests = batches(bitext.encoded(bitext.tests))
    trainer = Trainer(
        Translation(model, label_smoothing),
        batches(bitext.training),
        recipe,
        folder,
        validation=Validation(tests, min(8, len(tests)), validate_every),
        checkpoint_every=checkpoint_every,
        describe=partial(describe, model, bitext.tokenizer),
        quiet=quiet,
    )
    trainer.run()
    save(model, bitext.tokenizer, folder / "model")
    return model


def translate(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    *,
    beams: int = 1,
    longest: int = 96,
    batch_size: int = 32,
) -> list[str]:
    """The translations of sentences."""
    end = model.config.eos_ids[0]
    ids = [[*tokenizer.encode(source), end] for source in sources]
    # Neighbours of like length end together.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [""] * len(ids)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        answers = generate(model, [ids[i] for i in chosen], max_new_tokens=longest, num_beams=beams)
        for i, answer in zip(chosen, answers, strict=True):
            special = set(tokenizer.special.values())
            found[i] = tokenizer.decode(token for token in answer if token not in special)
    return found
