"""Cleaning, duplicates, and the split by document."""

from __future__ import annotations

import pytest

from llmcore.text import cleaning, corpora

TEXTS = corpora.documents("pydoc")


def test_cleaning_white_space_and_control_characters() -> None:
    assert cleaning.clean("\ufeff\n  a \t b\x00c \r\n\r\n\n\n  d  \n") == "  a bc\n\n  d"
    assert cleaning.clean("e\u0301") == "\u00e9"
    cleaned = [cleaning.clean(text) for text in TEXTS]
    assert [cleaning.clean(text) for text in cleaned] == cleaned


def test_cleaning_distinct_keeps_the_first() -> None:
    assert cleaning.distinct(["b", "a", "b", "B", "a"]) == ["b", "a", "B"]


def test_cleaning_near_duplicates() -> None:
    """A changed word is found, another text is not; what is found is held to the exact overlap."""
    long = [text for text in TEXTS if len(text) > 2000][:12]
    changed = long[4].replace(" the ", " such a ", 2)
    assert changed != long[4]
    assert cleaning.near_duplicates([*long, changed, long[0]]) == [(0, 13), (4, 12)]
    assert cleaning.without_near_duplicates([*long, changed, long[0]]) == long
    assert cleaning.near_duplicates([long[4], changed], threshold=1.0) == []
    with pytest.raises(ValueError, match="threshold must be"):
        cleaning.near_duplicates(long, threshold=0.0)


def test_cleaning_split_goes_by_content() -> None:
    texts = [f"document {i}" for i in range(2000)]
    training, held_out = cleaning.split(texts, 0.1)
    assert sorted(training + held_out) == sorted(texts)
    assert 150 < len(held_out) < 250
    assert set(cleaning.split(texts[::-2], 0.1)[1]) <= set(held_out)
    assert set(cleaning.split(texts, 0.1, seed=1)[1]) != set(held_out)
    assert set(held_out) <= set(cleaning.split(texts, 0.2)[1])
    with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
        cleaning.is_held_out("a", 1.5)
