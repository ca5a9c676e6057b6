"""What the commands that run a model have in common: which model, and how it speaks."""

import argparse
from typing import Any

import torch

from llmcore.generation.sampling import Sampling
from llmcore.models import Decoder, Encoder, load
from llmcore.text import Tokenizer


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="smollm2",
        metavar="MODEL",
        help="smollm2 (the default), a .gguf file, or a folder: Hugging Face's or llmcore's",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="FORM", help="bf16, int8 or int4: how weights are held (default: fp32)"
    )


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"tokens of an answer at most (default: {max_new_tokens})",
    )
    for name, kind, meaning in (
        ("temperature", float, "0, the default: the most probable token; above: sampled"),
        ("top-k", int, "sample from the k most probable tokens"),
        ("top-p", float, "sample from those that together reach this probability"),
        ("min-p", float, "sample from those at least this probable, to the best one's share"),
        ("repetition-penalty", float, "above 1: less of what was said already"),
        ("seed", int, "of the sampling (default: another each time)"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=meaning)


def load_model(args: argparse.Namespace, weights: str | None = None) -> tuple[Decoder, Tokenizer]:
    """The model that was asked for. Errors are `load`'s."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model, weights)
    if isinstance(model, Encoder):
        raise ValueError(f"{args.model} is an Encoder: it reads text and writes none")
    return model, tokenizer


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of Sampling that were given. ValueError when they are out of range."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    Sampling(**given)
    return given
