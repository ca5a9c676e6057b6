"""Files and folders appear whole or not at all; packages that can't be had say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcore import packages
from llmcore.storage import whole


def test_storage_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole(tmp_path / "a") as part:
        part.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with whole(tmp_path / "new" / "a") as part:
            part.write_text(text)
            assert not (tmp_path / "new" / "a").exists() or text == "two"
        assert (tmp_path / "new" / "a").read_text() == text
    with whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "b").write_text("b")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["b"]


def test_packages_debian_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get is not on this machine.*download words"):
        packages.debian_archive("words", tmp_path, "1 MB")
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    failed = packages.subprocess.CompletedProcess([], 100)
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"could not download words \(exit status 100\).*update"):
        packages.debian_archive("words", tmp_path, "1 MB")
