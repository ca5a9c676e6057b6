"""`llmcore demo translate`: the transformer of 2017 learns to translate LibreOffice's help."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmcore.models import EncoderDecoder
from llmcore.text import corpora
from llmcore.text.corpora import Pair
from llmcore.train import Interrupted, Recipe
from llmcore.train.metrics import clock, draw, plotting, read
from llmcore.train.translation import (
    Bitext,
    prepared_pairs,
    train_translation,
    translate,
    translation_config,
)

BLEU_GOAL, ABOVE_COPY = 15.0, 5.0
EXAMPLES = 5
PICTURED_TOKENS = range(5, 15)
"""Of the sentence whose attention is drawn: so many can be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = [name for name, corpus in corpora.CORPORA.items() if corpus.parallel]
    parser.add_argument("--data", choices=known, default=known[0], help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/translate"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=800, help="updates (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of the model (default: 192)")
    parser.add_argument("--layers", type=int, default=2, help="of each stack (default: 2)")
    parser.add_argument("--beams", type=int, default=1, help="of the search (default: 1, greedy)")
    parser.add_argument("--tests", type=int, default=400, help="sentences scored (default: 400)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> int:
    """Trains or goes on, scores, shows; 1 when the score is below the goal or text isn't to be had,
    130 when it was stopped."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        bitext = prepared_pairs(corpora.pairs(args.data), vocab_size=4000)
        tokens = sum(len(side) for pair in bitext.training for side in pair)
        print(
            f"{len(bitext.training):,} pairs to learn from, {tokens:,} tokens; "
            f"{len(bitext.tests):,} held out, of other pages",
            flush=True,
        )
        start = time.perf_counter()
        model = trained(args, bitext)
        print(f"trained in {clock(time.perf_counter() - start)}", flush=True)
    except (OSError, RuntimeError, ValueError, FloatingPointError) as error:
        print(f"llmcore demo translate: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return 130
    tests = spread_out(bitext.tests, args.tests)
    start = time.perf_counter()
    found = translate(model, bitext.tokenizer, [p.source for p in tests], beams=args.beams)
    print(f"{len(tests)} sentences translated in {clock(time.perf_counter() - start)}")
    reached = show_scores(tests, found)
    show_examples(tests, found)
    print(draw(read(args.out / "metrics.jsonl"), args.out / "loss.png"))
    print(draw_attention(model, bitext, tests, found, args.out / "attention.png"))
    print(f"model: {args.out / 'model'}")
    return 0 if reached else 1


def trained(args: argparse.Namespace, bitext: Bitext) -> EncoderDecoder:
    config = translation_config(
        bitext.tokenizer, width=args.width, layers=args.layers, feed_forward=3 * args.width
    )
    recipe = Recipe(
        steps=args.steps,
        learning_rate=2e-3,
        warm_up=args.steps // 10,
        weight_decay=0.01,
        beta2=0.98,
        precision=args.precision,
    )
    return train_translation(
        config, bitext, recipe, args.out, validate_every=400, checkpoint_every=200
    )


def spread_out(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of them, from all pages."""
    step = max(1, len(pairs) // count)
    return list(pairs[::step][:count])


def show_scores(tests: Sequence[Pair], found: Sequence[str]) -> bool:
    """BLEU and chrF beside those of copying the source; whether the goal is reached."""
    try:
        import sacrebleu
    except ImportError:
        print("no scores: sacrebleu is not installed (pip install 'llmcore[train]')")
        return True
    references = [[pair.target for pair in tests]]
    scores: dict[str, tuple[float, float]] = {}
    for name, texts in (("model", found), ("copying the source", [p.source for p in tests])):
        bleu = sacrebleu.corpus_bleu(texts, references).score
        scores[name] = bleu, sacrebleu.corpus_chrf(texts, references).score
    print(f"\n{'':<20}{'BLEU':>8}{'chrF':>8}")
    for name, (bleu, chrf) in scores.items():
        print(f"{name:<20}{bleu:>8.1f}{chrf:>8.1f}")
    bleu, copied = scores["model"][0], scores["copying the source"][0]
    reached = bleu >= BLEU_GOAL and bleu >= copied + ABOVE_COPY
    word = "reached" if reached else "NOT reached"
    print(f"goal, BLEU {BLEU_GOAL:g} and {ABOVE_COPY:g} above copying: {word}")
    return reached


def show_examples(tests: Sequence[Pair], found: Sequence[str]) -> None:
    step = max(1, len(tests) // EXAMPLES)
    for pair, text in list(zip(tests, found, strict=True))[::step][:EXAMPLES]:
        print(f"\n  source  {pair.source}\n  model   {text}\n  human   {pair.target}")
    print()


def draw_attention(
    model: EncoderDecoder,
    bitext: Bitext,
    tests: Sequence[Pair],
    found: Sequence[str],
    path: Path,
) -> str:
    """What each token of one translation looks at in its source: the last layer, mean of heads."""
    pyplot = plotting()
    if pyplot is None:
        return "no picture: matplotlib is not installed (pip install 'llmcore[train]')"
    tokenizer, config = bitext.tokenizer, model.config
    sources = [tokenizer.encode(pair.source) for pair in tests]
    fits = [i for i, ids in enumerate(sources) if len(ids) in PICTURED_TOKENS and found[i]]
    chosen = max(fits, key=lambda i: len(sources[i]), default=0)
    source = [*sources[chosen], config.eos_ids[0]]
    assert config.start_id is not None
    target = [config.start_id, *tokenizer.encode(found[chosen])]
    weights = model.cross_attention(torch.tensor([source]), torch.tensor([target]))
    # Row t is what was looked at when the token behind target t was chosen.
    labels = [*target[1:], config.eos_ids[0]]
    figure, axis = pyplot.subplots(figsize=(7, 7), layout="constrained")
    axis.imshow(weights[-1, 0].mean(dim=0).numpy(), cmap="Greys")
    _label(axis.set_xticks, tokenizer, source, rotation=90)
    _label(axis.set_yticks, tokenizer, labels)
    axis.set_xlabel("source")
    axis.set_ylabel("translation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture: {path}"


def _label(set_ticks: Any, tokenizer: Any, ids: Sequence[int], **options: Any) -> None:
    set_ticks(range(len(ids)), [tokenizer.decode([token]) for token in ids], **options)
