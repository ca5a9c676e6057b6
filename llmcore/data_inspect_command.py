"""`llmcore data inspect`: what is in a corpus or files before anything learns from it."""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence

from llmcore.text import cleaning, corpora

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 200
MOST_COMPARED = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(corpora.CORPORA)
    parser.add_argument("source", metavar="NAME|PATH", help=f"{known}; a file; a folder")
    parser.add_argument("--examples", type=int, default=3, help="documents to show (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="which examples (default: 0)")
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="overlap of near copies (default: 0.8)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints counts, lengths, copies, characters, examples; 1 when the source can't be read."""
    known = corpora.CORPORA.get(args.source)
    try:
        if known is not None:
            print(f"{known.about}; from {known.source}; {known.licence}")
        if known is not None and known.parallel:
            show_pairs(corpora.pairs(args.source), args.examples, args.seed)
        else:
            show_documents(corpora.documents(args.source), args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llmcore data inspect: {error}", file=sys.stderr)
        return 1
    return 0


def show_documents(texts: Sequence[str], args: argparse.Namespace) -> None:
    words = [len(text.split()) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    print(f"{len(texts):,} documents, {sum(words):,} words, {sum(sizes):,} bytes in UTF-8")
    show_lengths("bytes of a document", sizes)
    cleaned = [cleaning.clean(text) for text in texts]
    print(f"changed by cleaning: {sum(a != b for a, b in zip(texts, cleaned, strict=True)):,}")
    once = cleaning.distinct(cleaned)
    print(f"copies: {len(cleaned) - len(once):,}")
    if len(once) <= MOST_COMPARED:
        near = len(once) - len(cleaning.without_near_duplicates(once, args.threshold))
        print(f"near copies, overlap {args.threshold:g}: {near:,}")
    characters = Counter("".join(texts))
    foreign = sorted((c for c in characters if ord(c) > 126), key=lambda c: -characters[c])
    share = sum(characters[c] for c in foreign) / max(1, sum(characters.values()))
    often = " ".join(foreign[:20])
    print(f"{len(characters)} different characters; {share:.2%} are not ASCII: {often}".rstrip())
    for number in chosen(len(texts), args.examples, args.seed):
        print(f"\n[{number}] {shortened(texts[number])}")


def show_pairs(pairs: Sequence[corpora.Pair], examples: int, seed: int) -> None:
    pages = len({pair.document for pair in pairs})
    print(f"{len(pairs):,} pairs on {pages:,} pages")
    show_lengths("words of a source", [len(pair.source.split()) for pair in pairs])
    show_lengths("words of a target", [len(pair.target.split()) for pair in pairs])
    print(f"copies: {len(pairs) - len({(p.source, p.target) for p in pairs}):,}")
    variants = Counter(source for source, _ in {(p.source, p.target) for p in pairs})
    print(f"sources with several targets: {sum(n > 1 for n in variants.values()):,}")
    for number in chosen(len(pairs), examples, seed):
        pair = pairs[number]
        print(f"\n[{number}] {shortened(pair.source)}\n    {shortened(pair.target)}")


def show_lengths(what: str, lengths: Sequence[int]) -> None:
    ordered = sorted(lengths)
    points = [ordered[round(q * (len(ordered) - 1))] for q in QUANTILES]
    print(f"{what}, least, quartiles, most: {', '.join(f'{n:,}' for n in points)}")


def chosen(count: int, examples: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), min(examples, count)))


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " ..."
