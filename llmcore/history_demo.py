"""`llmcore demo history`: from counting words to transformers, on one text.

Three things are shown: how well each model predicts held-out text after reading the same tokens,
how the time of training grows with length where tokens are read one after the other and where they
are read at once, and how far back each one's gradient reaches.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmcore.history import Recurrent, RecurrentConfig
from llmcore.history.gradients import gradient_shares
from llmcore.history.recurrent import Kind
from llmcore.models import Decoder
from llmcore.train.metrics import plotting
from llmcore.train.preparation import Preparation, Prepared, prepare
from llmcore.train.pretrain import (
    Options,
    Preset,
    judge,
    model_config,
    ngrams,
    pretrain,
    recurrent,
    rivals_table,
)
from llmcore.train.recipe import Recipe

KINDS: tuple[Kind, ...] = ("rnn", "gru", "lstm")
LENGTHS = (16, 64, 256, 1024)
DISTANCES = (1, 2, 4, 8, 16, 32, 64)
SEEN = 97
"""Tokens of a sequence whose gradients are measured: its very first ones are not shown, which have
nothing before them and so a larger part."""
OPEN_FORGET_BIAS = 3.0
BATCH_TOKENS, ROW_TOKENS = 2048, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="bible",
        metavar="NAME|PATH",
        help="a corpus, a file or a folder (default: bible; pydoc needs no network)",
    )
    parser.add_argument("--tokens", type=int, default=300_000, help="to read (default: 300000)")
    parser.add_argument("--width", type=int, default=128, help="of all networks (default: 128)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/history"), help="folder (default: runs/history)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> int:
    """All three parts; 1 when the text can't be had."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        preset = preset_of(args)
        prepared = prepare(preset.preparation, args.out / "data")
        show_likelihoods(preset, prepared, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llmcore demo history: {error}", file=sys.stderr)
        return 1
    models = networks(preset, prepared)
    show_speed(models)
    shares = {name: gradient_shares(model, SEEN) for name, model in models.items()}
    show_shares(shares)
    print(draw_shares(shares, args.out / "gradients.png"))
    return 0


def preset_of(args: argparse.Namespace) -> Preset:
    """The transformer and the batches; every network has the same width."""
    steps = max(1, args.tokens // BATCH_TOKENS)
    heads = max(1, args.width // 32)
    shape = {
        "width": args.width,
        "layers": 2,
        "heads": heads,
        "kv_heads": heads,
        "head_width": 32,
        "feed_forward": 3 * args.width,
    }
    return Preset(
        Preparation((args.data,), vocab_size=1024),
        shape,
        Recipe(steps=steps, learning_rate=4e-3, warm_up=steps // 10),
        length=ROW_TOKENS,
        rows=BATCH_TOKENS // ROW_TOKENS,
        recurrent_width=args.width,
    )


def show_likelihoods(preset: Preset, prepared: Prepared, folder: Path) -> None:
    print(
        f"Held-out text after {preset.tokens:,} tokens (n-grams: all {len(prepared.training):,}):"
    )
    options = Options(validate_every=0, checkpoint_every=0, quiet=True)
    rivals = ngrams(prepared)
    rivals += [recurrent(kind, preset, prepared, folder, options) for kind in KINDS]
    start = time.perf_counter()
    model = pretrain(preset, prepared, folder / "transformer", options)
    seconds = time.perf_counter() - start
    rivals.append(judge("transformer", model, prepared, tokens=preset.tokens, seconds=seconds))
    print(*rivals_table(rivals), sep="\n")


def networks(preset: Preset, prepared: Prepared) -> dict[str, Any]:
    """Untrained, as a training run finds them."""
    size, width = len(prepared.tokenizer), preset.recurrent_width
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for kind in KINDS:
        found[kind.upper()] = Recurrent(RecurrentConfig(kind, size, width))
    open_gates = RecurrentConfig("lstm", size, width, forget_bias=OPEN_FORGET_BIAS)
    found[f"LSTM, forget bias {OPEN_FORGET_BIAS:g}"] = Recurrent(open_gates)
    longer = dataclasses.replace(
        model_config(preset, prepared.tokenizer), context_length=LENGTHS[-1]
    )
    found["transformer"] = Decoder(longer)
    return found


def show_speed(models: Mapping[str, Any]) -> None:
    """Time of a token in training: ever as many tokens, in ever fewer and longer sequences."""
    print(
        f"\nMicroseconds a token, forward and backward, {BATCH_TOKENS} tokens in sequences of "
        "this length:\n"
    )
    print(f"  {'':<22}" + "".join(f"{length:>9}" for length in LENGTHS))
    for name, model in models.items():
        times = [seconds_a_token(model, length) for length in LENGTHS]
        print(f"  {name:<22}" + "".join(f"{1e6 * t:>9.1f}" for t in times), flush=True)


def seconds_a_token(model: Any, length: int, rounds: int = 3) -> float:
    """The fastest of some rounds behind one to get warm."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_TOKENS // length, length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model.loss(ids, ids).backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return min(times[1:]) / BATCH_TOKENS


def show_shares(shares: Mapping[str, torch.Tensor]) -> None:
    print("\nGradient at a distance, as a share of the one at distance 1, before training:\n")
    print(f"  {'distance':<22}" + "".join(f"{d:>10}" for d in DISTANCES))
    for name, share in shares.items():
        print(f"  {name:<22}" + "".join(f"{float(share[d]):>10.1e}" for d in DISTANCES))


def draw_shares(shares: Mapping[str, torch.Tensor], path: Path) -> str:
    pyplot = plotting()
    if pyplot is None:
        return "\nno picture: matplotlib is not installed (pip install 'llmcore[train]')"
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, share in shares.items():
        axis.semilogy(range(1, DISTANCES[-1] + 1), share[1 : DISTANCES[-1] + 1], label=name)
    axis.set_xlabel("distance in tokens")
    axis.set_ylabel("gradient, as a share of distance 1")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"\npicture: {path}"
