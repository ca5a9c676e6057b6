"""From documents to what is trained on: cleaned, each once, split, tokenized, in shards.

tokenizer.json ...      trained on the training part only
training/ validation/   shards
preparation.json        the settings and what came out; the same settings find it ready
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmcore.storage import whole
from llmcore.text import Tokenizer, cleaning, corpora, vocabulary
from llmcore.text.shards import Shards, write_shards

Vocabulary = Literal["bpe", "words", "bytes"]
REPORT_FILE = "preparation.json"


@dataclass(frozen=True)
class Preparation:
    """What is to come out of which texts.

    sources           names of corpora, files, folders
    held_out          the validation's share of the documents
    near_duplicates   how much two documents may overlap; 1.0: only equal ones are dropped
    special           tokens that the vocabulary has besides the one that ends a text
    """

    sources: tuple[str, ...]
    vocabulary: Vocabulary = "bpe"
    vocab_size: int = 2048
    held_out: float = 0.05
    near_duplicates: float = 0.8
    seed: int = 0
    special: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "special", tuple(self.special))
        if not self.sources:
            raise ValueError("sources: at least one corpus, file or folder is needed")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class Prepared:
    """Shards of both parts and their tokenizer; `counts` says what became of the documents."""

    tokenizer: Tokenizer
    training: Shards
    validation: Shards
    counts: dict[str, int]

    def validation_documents(self) -> list[list[int]]:
        """Ids of each held-out document, its separator first."""
        return [self.validation.document(i).tolist() for i in range(len(self.validation.starts))]


def prepare(preparation: Preparation, folder: Path) -> Prepared:
    """Into a new folder, or out of it where it was made with the same settings from the same texts.

    ValueError for a folder of other settings, and when a part would be without a document.
    """
    texts = [text for source in preparation.sources for text in corpora.documents(source)]
    settings = {**dataclasses.asdict(preparation), "texts": _digest(texts)}
    settings = json.loads(json.dumps(settings))
    if (folder / REPORT_FILE).is_file():
        return _ready(folder, settings)
    cleaned = [text for text in map(cleaning.clean, texts) if text]
    once = cleaning.distinct(cleaned)
    kept = cleaning.without_near_duplicates(once, preparation.near_duplicates)
    training, validation = cleaning.split(kept, preparation.held_out, preparation.seed)
    if not training or not validation:
        raise ValueError(
            f"{len(kept)} documents are too few to hold out {preparation.held_out:.0%} of them"
        )
    with whole(folder) as part:
        part.mkdir()
        tokenizer = made_tokenizer(training, preparation)
        tokenizer.save(part)
        shards = {
            name: write_shards(part / name, documents, tokenizer)
            for name, documents in (("training", training), ("validation", validation))
        }
        counts = {
            "documents": len(texts),
            "copies": len(cleaned) - len(once),
            "near_copies": len(once) - len(kept),
            "training_documents": len(training),
            "validation_documents": len(validation),
            "training_tokens": len(shards["training"]),
            "validation_tokens": len(shards["validation"]),
            "validation_bytes": sum(len(text.encode()) for text in validation),
        }
        report = json.dumps({"settings": settings, "counts": counts}, indent=2) + "\n"
        (part / REPORT_FILE).write_text(report, encoding="utf-8")
    return _ready(folder, settings)


def made_tokenizer(texts: Sequence[str], preparation: Preparation) -> Tokenizer:
    """The tokenizer that is asked for, from these texts; ValueError for another kind."""
    kind, size = preparation.vocabulary, preparation.vocab_size
    special = (vocabulary.END, *preparation.special)
    if kind == "bpe":
        return vocabulary.train_bpe(texts, size, special)
    if kind == "words":
        return vocabulary.train_words(texts, size, special)
    if kind == "bytes":
        return vocabulary.byte_tokenizer(special)
    raise ValueError(f"vocabulary must be bpe, words or bytes, got {kind!r}")


def _ready(folder: Path, settings: dict[str, Any]) -> Prepared:
    found = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found["settings"].get(name) != value:
            raise ValueError(
                f"{folder} was prepared with other {name}: take another folder, or remove it"
            )
    return Prepared(
        Tokenizer.from_folder(folder),
        Shards(folder / "training"),
        Shards(folder / "validation"),
        found["counts"],
    )


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
