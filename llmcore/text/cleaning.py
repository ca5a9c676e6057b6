"""Documents made fit to train on: normalised, and each said once.

Duplicates are worth finding: a model learns them by heart, and one that stands on both sides of a
split makes a validation loss mean nothing (Lee et al. 2022, https://arxiv.org/abs/2107.06499).
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_SPACES = re.compile(r"(?<=\S)[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")

HASHES, BANDS = 64, 16
"""Of near_duplicates: 16 bands of 4 hashes find a pair of similarity 0.8 with probability 0.9998,
one of 0.5 with 0.64 (it is then compared), one of 0.2 with 0.03."""

SHINGLE = 5
"""Words in a row that count as one feature of a text."""


def clean(text: str) -> str:
    """The text in Unicode's composed form, without control characters, in tidy white space.

    Behind a line's first word, spaces and tabs in a row are one space; lines have none at their
    ends, blank lines in a row are one, and the text begins and ends with something else.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _SPACES.sub(" ", _CONTROL.sub("", text))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip("\n").rstrip()


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts in their order, each once; compared to the letter."""
    return list(dict.fromkeys(texts))


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts whose sets of five-word runs overlap by `threshold` or more.

    The overlap is |A and B| / |A or B| (Jaccard's), computed exactly; the pairs it is computed for
    are those whose MinHash signatures agree in a band (Broder 1997), so that a pair may be missed:
    see BANDS. ValueError for a threshold outside 0 to 1.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    shingles = [_shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for i, found in enumerate(shingles):
        for band, rows in enumerate(np.split(_signature(found), BANDS)):
            buckets[band, rows.tobytes()].append(i)
    # A text is compared with the first of its bucket only: of n copies, n - 1 pairs are enough.
    pairs = {(bucket[0], j) for bucket in buckets.values() for j in bucket[1:]}
    return sorted((i, j) for i, j in pairs if _overlap(shingles[i], shingles[j]) >= threshold)


def without_near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[str]:
    """The texts but those that are nearly one before them."""
    later = {j for _, j in near_duplicates(texts, threshold)}
    return [text for i, text in enumerate(texts) if i not in later]


def is_held_out(text: str, fraction: float, seed: int = 0) -> bool:
    """Whether a document belongs to the validation part: about `fraction` of all do.

    Its content decides and nothing else: the same document is on the same side whatever stands
    beside it, and so are copies of it. ValueError for a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") < fraction * 2.0**64


def split(documents: Iterable[str], fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and validation documents, by `is_held_out`."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[is_held_out(document, fraction, seed)].append(document)
    return sides


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower()) or [text]
    runs = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    return frozenset(
        int.from_bytes(hashlib.blake2b(run.encode(), digest_size=4).digest(), "little")
        for run in runs
    )


def _signature(shingles: frozenset[int]) -> np.ndarray:
    """The least value of each of HASHES functions (a x + b) mod p over a text's shingles."""
    prime = np.uint64((1 << 31) - 1)  # so that a x + b fits into 64 bits
    generator = np.random.Generator(np.random.Philox(0))
    a = generator.integers(1, int(prime), HASHES, dtype=np.uint64)
    b = generator.integers(0, int(prime), HASHES, dtype=np.uint64)
    values = np.fromiter(shingles, dtype=np.uint64) % prime
    found: np.ndarray = ((a[:, None] * values + b[:, None]) % prime).min(axis=1)
    return found


def _overlap(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)
