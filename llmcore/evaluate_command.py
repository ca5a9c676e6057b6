"""`llmcore evaluate`: how well a model predicts text, and what packing its weights changes."""

import argparse
import sys
from pathlib import Path

from llmcore.evaluate import Likelihood, evaluate
from llmcore.model_arguments import add_model, load_model
from llmcore.models import Decoder
from llmcore.text import Tokenizer

FULL = "fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="FILE", help="text files"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FORM",
        help="bf16, int8, int4: also with its weights in these forms, beside float32",
    )
    parser.add_argument(
        "--window", type=int, help="tokens seen at once (default: 1024, or the model's context)"
    )
    parser.add_argument("--stride", type=int, help="between windows (default: half a window)")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each form of the weights; 1 when a file or a form can't be had."""
    forms = [FULL, *(form for form in dict.fromkeys(args.weights) if form != FULL)]
    plain: Likelihood | None = None
    try:
        texts = {path: path.read_bytes() for path in args.text}
        for form in forms:
            model, tokenizer = load_model(args, None if form == FULL else form)
            found = _over(texts, model, tokenizer, args)
            if plain is None:
                print(f"{found.tokens} tokens, {found.bytes} bytes predicted\n")
                print(f"{'weights':<10}{'perplexity':>12}{'bits/byte':>12}{'change':>12}")
                plain = found
            print(_row(form, found, plain), flush=True)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llmcore evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def _over(
    texts: dict[Path, bytes], model: Decoder, tokenizer: Tokenizer, args: argparse.Namespace
) -> Likelihood:
    total = Likelihood()
    for path, text in texts.items():
        try:
            total += evaluate(model, tokenizer, text, window=args.window, stride=args.stride)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if total.tokens == 0:
        raise ValueError("there is nothing to predict: a text needs two tokens")
    return total


def _row(form: str, found: Likelihood, plain: Likelihood) -> str:
    change = "" if found is plain else f"{found.perplexity / plain.perplexity - 1:+.3%}"
    return f"{form:<10}{found.perplexity:>12.4f}{found.bits_per_byte:>12.5f}{change:>12}".rstrip()
