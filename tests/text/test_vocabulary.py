"""Trained tokenizers: any bytes make the round trip, and the vocabulary is what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.text import Tokenizer, corpora, vocabulary

TEXTS = corpora.documents("pydoc")[:20]
MADE = {
    "bytes": vocabulary.byte_tokenizer(),
    "bpe": vocabulary.train_bpe(TEXTS, 700),
    "words": vocabulary.train_words(TEXTS, 700),
}


@pytest.mark.parametrize("kind", MADE)
@given(data=st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
@settings(max_examples=80, deadline=None)
def test_vocabulary_round_trip(kind: str, data: bytes) -> None:
    tokenizer = MADE[kind]
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@pytest.mark.parametrize("kind", MADE)
def test_vocabulary_special_tokens_and_files(kind: str, tmp_path: Path) -> None:
    tokenizer = MADE[kind]
    assert tokenizer.eos_id == 0 and tokenizer.special == {vocabulary.END: 0}
    assert tokenizer.decode(tokenizer.encode(vocabulary.END)) == vocabulary.END
    assert 0 not in tokenizer.encode(vocabulary.END)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3]) and len(again) == len(tokenizer)


def test_vocabulary_sizes_and_lengths() -> None:
    sizes = {kind: len(tokenizer) for kind, tokenizer in MADE.items()}
    assert sizes == {"bytes": 257, "bpe": 700, "words": 700}
    text = TEXTS[0]
    counts = {kind: len(tokenizer.encode(text)) for kind, tokenizer in MADE.items()}
    assert counts["bytes"] == len(text.encode()) > counts["words"] > counts["bpe"]


def test_vocabulary_words_are_the_most_frequent() -> None:
    tokenizer = vocabulary.train_words(["b b b aa aa c dd"], 257 + 2)
    assert len(tokenizer.encode(" b b aa")) == 3  # " b" and " aa"
    assert len(tokenizer.encode(" dd")) == 3  # bytes


@pytest.mark.parametrize("train", [vocabulary.train_bpe, vocabulary.train_words])
def test_vocabulary_needs_place_for_the_bytes(train: Callable[..., Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"size must be at least 257.*got 256"):
        train(TEXTS, 256)
