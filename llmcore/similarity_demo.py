"""`llmcore demo similarity`: sentences ranked by their meaning, with MiniLM as our Encoder."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from llmcore.models import Encoder, embed, load
from llmcore.models.convert import to_transformers
from llmcore.text import WordPieces

QUERIES = ("How do I bake bread?", "The stock market fell sharply.", "A dog is running outside.")
SENTENCES = (
    "Mix flour, water and yeast, then put the dough in a hot oven.",
    "Share prices dropped across the exchange today.",
    "The puppy is playing in the garden.",
    "A cat sleeps on the sofa.",
    "Interest rates were raised by the central bank.",
    "The train to Paris leaves at noon.",
)
# What each query must find first.
BEST = (0, 1, 2)
TOLERANCE = 1e-4  # of hidden states beside transformers'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help="your own: the first is compared with all"
    )


def run(args: argparse.Namespace) -> int:
    """The table; 1 when the model can't be had, or ranks or computes what it should not."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print("Loading all-MiniLM-L6-v2 ...", flush=True)
    try:
        model, tokenizer = load("minilm")
    except (OSError, RuntimeError) as error:
        print(f"FAILED: {error}")
        return 1
    if args.sentences:
        show(model, tokenizer, args.sentences[:1], args.sentences)
        return 0
    found = show(model, tokenizer, QUERIES, SENTENCES)
    passed = found == list(BEST)
    if not passed:
        print(f"FAILED: expected the sentences {list(BEST)} first, got {found}")
    return 0 if compare(model, tokenizer) and passed else 1


def show(
    model: Encoder, tokenizer: WordPieces, queries: Sequence[str], sentences: Sequence[str]
) -> list[int]:
    """Print all sentences for each query, the nearest first; returns the number of each nearest."""
    cosines = embed(model, tokenizer, queries) @ embed(model, tokenizer, sentences).T
    for query, row in zip(queries, cosines, strict=True):
        print(f"\n  {query}\n")
        for i in row.argsort(descending=True).tolist():
            print(f"  {row[i].item():>8.3f}  {sentences[i]}")
    return cosines.argmax(dim=1).tolist()


@torch.no_grad()
def compare(model: Encoder, tokenizer: WordPieces) -> bool:
    """Whether hidden states are those of transformers; prints by how much they differ."""
    try:
        stock: Any = to_transformers(model)
    except ImportError:
        print("\ntransformers is not installed: not compared with it.")
        return True
    ids, mask, types = tokenizer.batch(SENTENCES)
    theirs = stock(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
    error = float((model(ids, mask, types) - theirs)[mask].abs().max())
    passed = error <= TOLERANCE
    print(
        f"\nHidden states of the sentences, against transformers: {error:.1e} at most, allowed "
        f"{TOLERANCE:.0e}: {'ok' if passed else 'FAILED'}"
    )
    return passed
