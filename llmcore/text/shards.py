"""Token ids on disk: memory-mapped shards, written once, read by many processes at once.

    index.json      {"format", "dtype", "vocab_size", "tokens", "shards": [tokens in each]}
    tokens-0000.bin little-endian uint16, or uint32 where the vocabulary needs it; no header
    starts.npy      int64: where each document begins, counted over all shards

Every document begins with the separator token, which so ends the one before and tells a model that
there is nothing before; so each token of a document, its first one included, is predicted from what
stands before it. A document may reach from one shard into the next.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmcore.storage import whole
from llmcore.text.tokenizer import Tokenizer

INDEX_FILE, STARTS_FILE = "index.json", "starts.npy"
FORMAT = 1
SHARD_TOKENS = 1 << 26
"""By default: 128 MB at two bytes a token."""


def write_shards(
    folder: str | Path,
    documents: Iterable[str | bytes],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> "Shards":
    """Tokenize documents into a new folder, which appears whole or not at all.

    ValueError when there are no documents, the tokenizer has no end token, or a document holds what
    it can't encode; OSError where the folder exists and isn't empty.
    """
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end token to separate documents by")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    folder = Path(folder)
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    with whole(folder) as part:
        part.mkdir()
        writer = _Writer(part, dtype, shard_tokens)
        for document in documents:
            writer.add([tokenizer.eos_id, *tokenizer.encode(document)])
        writer.finish(len(tokenizer))
    return Shards(folder)


class Shards:
    """The tokens of a folder that write_shards made, as one long array.

    starts  (D,) int64, where each document begins, at its separator
    """

    def __init__(self, folder: str | Path) -> None:
        """ValueError for a folder that holds none, or not whole ones."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}; this version reads {FORMAT}")
            dtype, sizes = np.dtype(index["dtype"]), list(map(int, index["shards"]))
            self.vocab_size = int(index["vocab_size"])
            self.starts: np.ndarray = np.load(folder / STARTS_FILE, allow_pickle=False)
            self._parts = [_mapped(folder / _name(i), dtype, n) for i, n in enumerate(sizes)]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold whole shards: {error}") from error
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        """Tokens of all documents with their separators."""
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop (int64), which must lie inside."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        found = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = int(end) - len(part)
            if start < end and stop > first:
                found.append(part[max(start - first, 0) : stop - first])
        return np.concatenate(found or [np.empty(0)]).astype(np.int64)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, its separator first."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self)
        return self.read(int(self.starts[number]), int(end))


class _Writer:
    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.waiting: list[np.ndarray] = []
        self.count = 0

    def add(self, tokens: list[int]) -> None:
        self.starts.append(sum(self.sizes) + self.count)
        self.waiting.append(np.array(tokens, self.dtype))
        self.count += len(tokens)
        while self.count >= self.shard_tokens:
            self._write(self.shard_tokens)

    def _write(self, tokens: int) -> None:
        joined = np.concatenate(self.waiting)
        joined[:tokens].tofile(self.folder / _name(len(self.sizes)))
        self.sizes.append(tokens)
        self.waiting, self.count = [joined[tokens:]], len(joined) - tokens

    def finish(self, vocab_size: int) -> None:
        if not self.starts:
            raise ValueError("there are no documents")
        if self.count:
            self._write(self.count)
        np.save(self.folder / STARTS_FILE, np.array(self.starts, np.int64))
        index = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "vocab_size": vocab_size,
            "tokens": sum(self.sizes),
            "shards": self.sizes,
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _name(shard: int) -> str:
    return f"tokens-{shard:04d}.bin"


def _mapped(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    found = np.memmap(path, dtype, mode="r")
    if len(found) != tokens:
        raise ValueError(f"{path.name} has {len(found)} tokens, the index says {tokens}")
    return found
