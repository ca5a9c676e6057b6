"""`llmcore pretrain`: from text to a model, and what simpler models make of the same text."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from llmcore.generate import generate
from llmcore.history.recurrent import Kind
from llmcore.models import Decoder
from llmcore.text import corpora
from llmcore.text.masking import SPECIAL, MaskedPairs
from llmcore.train import Interrupted, Processes
from llmcore.train.loop import METRICS_FILE
from llmcore.train.metrics import draw, read
from llmcore.train.preparation import Prepared, prepare
from llmcore.train.pretrain import (
    PRESETS,
    VALIDATION_BATCHES,
    Options,
    Preset,
    changed,
    judge,
    masked_accuracy,
    ngrams,
    pretrain,
    recurrent,
    rivals_table,
)

RIVALS: tuple[Kind, ...] = ("lstm", "gru")
PROMPT_TOKENS, SAMPLE_TOKENS = 8, 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    known = ", ".join(name for name, corpus in corpora.CORPORA.items() if not corpus.parallel)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help=presets)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="NAME|PATH",
        help=f"what to learn from: {known}; files, folders (default: the preset's)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the run (default: runs/PRESET); a run that was stopped there goes on",
    )
    parser.add_argument("--steps", type=int, help="updates of the weights")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="the highest")
    parser.add_argument("--rows", type=int, help="of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--accumulate", type=int, metavar="N", help="batches for each update")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the products")
    parser.add_argument(
        "--average", type=float, metavar="DECAY", help="moving average of the weights (default: no)"
    )
    parser.add_argument("--vocabulary", choices=("bpe", "words", "bytes"), help="kind of tokens")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="number of tokens")
    parser.add_argument("--seed", type=int, help="of weights, order and dropout (default: 0)")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="keep no activations inside of blocks, compute them again: less memory, more time",
    )
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--validate-every", type=int, default=100, metavar="STEPS")
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun: how"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write its events")
    parser.add_argument("--no-rivals", action="store_true", help="train nothing to compare with")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> int:
    """Trains, compares, samples; 1 when something can't be had, 130 when it was stopped."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = args.out or Path("runs") / args.preset
    processes = Processes(args.parallel)
    try:
        preset = preset_of(args)
        if processes.is_first:
            prepare(preset.preparation, folder / "data")
        processes.wait()
        prepared = prepare(preset.preparation, folder / "data")
        options = Options(
            args.validate_every,
            args.checkpoint_every,
            recompute=args.recompute,
            quiet=not processes.is_first,
            tensorboard=args.tensorboard,
            processes=processes,
        )
        if processes.is_first:
            show_data(prepared, preset)
        model = pretrain(preset, prepared, folder, options)
        if processes.count == 1:
            show_result(model, preset, prepared, folder, options, args)
    except (OSError, RuntimeError, ValueError, FloatingPointError, ImportError) as error:
        print(f"llmcore pretrain: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"{error}; the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        processes.leave()
    return 0


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset with what the command line changes."""
    preset = PRESETS[args.preset]
    names = ("steps", "learning_rate", "accumulate", "precision", "average", "seed")
    recipe = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    steps = recipe.get("steps", preset.recipe.steps)
    if preset.recipe.warm_up > steps // 4:
        recipe["warm_up"] = steps // 4
    preparation: dict[str, Any] = {}
    if args.data is not None:
        preparation["sources"] = tuple(args.data)
    for name in ("vocabulary", "vocab_size"):
        if getattr(args, name) is not None:
            preparation[name] = getattr(args, name)
    if preset.objective == "masked":
        preparation["special"] = SPECIAL
    changes = {n: getattr(args, n) for n in ("rows", "length") if getattr(args, n) is not None}
    return changed(
        preset,
        recipe=recipe,
        preparation=dataclasses.replace(preset.preparation, **preparation),
        **changes,
    )


def show_data(prepared: Prepared, preset: Preset) -> None:
    counts = prepared.counts
    print(
        f"{counts['documents']:,} documents ({counts['copies']:,} copies and "
        f"{counts['near_copies']:,} near copies dropped); "
        f"{counts['training_tokens']:,} tokens to learn from, "
        f"{counts['validation_tokens']:,} held out; vocabulary {len(prepared.tokenizer):,}; "
        f"{preset.tokens:,} tokens to read",
        flush=True,
    )


def show_result(
    model: Any,
    preset: Preset,
    prepared: Prepared,
    folder: Path,
    options: Options,
    args: argparse.Namespace,
) -> None:
    """The comparison, a sample, the picture; or what an encoder tells."""
    records = read(folder / METRICS_FILE)
    if not isinstance(model, Decoder):
        data = MaskedPairs(prepared.validation, prepared.tokenizer, preset.length, preset.rows)
        told, pairs = masked_accuracy(model, data, min(VALIDATION_BATCHES, data.batches))
        print(f"hidden tokens told right: {told:.1%}; pairs told right: {pairs:.1%}")
        print(draw(records, folder / "loss.png"))
        return
    spent = trained_seconds(records)
    tokens = records[-1]["tokens"]
    rivals = [judge("transformer", model, prepared, tokens=tokens, seconds=spent)]
    if not args.no_rivals:
        rivals += ngrams(prepared)
        rivals += [recurrent(kind, preset, prepared, folder, options) for kind in RIVALS]
    print(*rivals_table(rivals), sep="\n")
    show_sample(model, prepared)
    lines = {rival.name: rival.nats_per_token for rival in rivals[1:]}
    print(draw(records, folder / "loss.png", lines))
    print(f"model: {folder / 'model'}")


def trained_seconds(records: list[dict[str, Any]]) -> float:
    """The time of all steps, by the tokens that each read and how fast."""
    before, total = 0, 0.0
    for record in records:
        total += (record["tokens"] - before) / record["tokens_per_second"]
        before = record["tokens"]
    return total


def show_sample(model: Decoder, prepared: Prepared) -> None:
    """How a held-out document begins, and how the model goes on."""
    document = prepared.validation_documents()[0][: PROMPT_TOKENS + 1]
    ids = torch.tensor([document])
    count = min(SAMPLE_TOKENS, model.config.context_length - ids.shape[1])
    found = generate(model, ids, max_new_tokens=count, temperature=0.8, top_p=0.95, seed=0)
    prompt, rest = found[0, 1 : len(document)], found[0, len(document) :]
    text = prepared.tokenizer.decode(prompt.tolist())
    print(f"\nA sample, behind [{text}]:\n{prepared.tokenizer.decode(rest.tolist())}\n")
