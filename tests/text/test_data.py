"""Shards, the order of samples, packed and padded batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcore.text import corpora, vocabulary
from llmcore.text.data import (
    IGNORED,
    Order,
    Packed,
    Translations,
    length_batches,
    pad,
)
from llmcore.text.shards import Shards, write_shards

TEXTS = [text[:90] for text in corpora.documents("pydoc")[:30]]
TOKENIZER = vocabulary.byte_tokenizer()


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "shards", TEXTS, TOKENIZER, shard_tokens=256)


def test_shards_hold_the_documents(shards: Shards, tmp_path: Path) -> None:
    again = Shards(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("tokens-*.bin"))) == -(-len(shards) // 256)
    assert len(again) == sum(len(text.encode()) + 1 for text in TEXTS)
    for number, text in enumerate(TEXTS):
        separator, *tokens = again.document(number).tolist()
        assert separator == TOKENIZER.eos_id and TOKENIZER.decode(tokens) == text
    whole = again.read(0, len(again))
    assert np.array_equal(again.read(250, 530), whole[250:530]) and len(again.read(7, 7)) == 0
    with pytest.raises(IndexError):
        again.read(0, len(again) + 1)


def test_shards_of_a_large_vocabulary_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = vocabulary.byte_tokenizer()
    tokenizer.add_special(*(f"<{i}>" for i in range(1 << 16)))
    found = write_shards(tmp_path / "wide", ["ab"], tokenizer)
    assert found.document(0).tolist() == [0, *tokenizer.encode("ab")]
    assert json.loads((tmp_path / "wide" / "index.json").read_text())["dtype"] == "<u4"


def test_shards_refuse_what_is_not_whole(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documents"):
        write_shards(tmp_path / "none", [], TOKENIZER)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="does not hold whole shards"):
        Shards(tmp_path)
    first = tmp_path / "shards" / "tokens-0000.bin"
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(ValueError, match="has 255 tokens, the index says 256"):
        Shards(tmp_path / "shards")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_order_is_a_new_permutation_each_epoch(count: int) -> None:
    order = Order(count, seed=3)
    epochs = [[order.place(e * count + i) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [Order(count, seed=4).place(i) for i in range(count)]
    # The position is all there is: another object, asked in the middle, says the same.
    assert Order(count, seed=3).place(count + count // 2) == epochs[1][count // 2]


def test_order_looks_random() -> None:
    """Neighbours in the order are no neighbours in the data, and no place is preferred."""
    order = Order(1000, seed=0)
    places = np.array([order.place(i) for i in range(20000)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    firsts = places.reshape(20, 1000)[:, :100]
    assert abs(firsts.mean() - 499.5) < 25


def test_packed_batches_cover_the_stream_once(shards: Shards) -> None:
    data = Packed(shards, length=16, rows=2)
    batches = [data.batch(i) for i in range(data.tokens // 32)]
    rows = torch.cat([batch.inputs["ids"] for batch in batches])
    stream = shards.read(0, len(shards))
    expected = torch.from_numpy(stream[: len(rows) * 16].copy()).view(-1, 16)
    known = {tuple(row.tolist()) for row in torch.from_numpy(stream[: data.tokens]).view(-1, 16)}
    assert len(rows) in (len(expected), len(expected) + 1)
    assert {tuple(row.tolist()) for row in rows} <= known and len({*map(tuple, rows.tolist())}) > 99
    for batch in batches[:5]:
        ids, targets = batch.inputs["ids"], batch.inputs["targets"]
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        assert batch.targets == batch.tokens == ids.numel()


def test_packed_batches_tell_where_documents_begin(shards: Shards) -> None:
    data = Packed(shards, length=64, rows=3)
    for position in range(4):
        batch = data.batch(position)
        ids, cuts = batch.inputs["ids"].flatten(), batch.inputs["cu_seqlens"]
        separators = (ids == TOKENIZER.eos_id).nonzero().flatten().tolist()
        assert cuts.tolist() == sorted({0, 64, 128, 192, *separators})
        assert cuts.dtype == torch.int32
    assert "cu_seqlens" not in Packed(shards, 64, 3, separate=False).batch(0).inputs
    with pytest.raises(ValueError, match="rows of 99999 tokens need 100000"):
        Packed(shards, 99999, 1)


def test_pad() -> None:
    assert pad([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    with pytest.raises(ValueError, match="at least one row"):
        pad([], 0)


def test_length_batches() -> None:
    lengths = [3, 9, 1, 8, 2, 30, 9]
    batches = length_batches(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[5], [1, 6], [3, 0], [4, 2]]


def test_translations_batches() -> None:
    pairs = [([5, 6, 7], [8]), ([5], [6, 7]), ([9, 9], [4, 4, 4])]
    data = Translations(pairs, tokens=100, start=1, end=2, pad=0)
    inputs = data.batch(0).inputs
    order = [row[0] for row in inputs["source_ids"].tolist()]
    assert sorted(order) == [5, 5, 9] and len(data) == 1
    first = inputs["source_ids"].tolist().index([5, 6, 7, 2])
    assert inputs["target_ids"][first].tolist() == [1, 8, 0, 0]
    assert inputs["targets"][first].tolist() == [8, 2, IGNORED, IGNORED]
    assert inputs["source_mask"].sum(dim=1).tolist() == [
        len([t for t in row if t]) for row in inputs["source_ids"].tolist()
    ]
    assert data.batch(0).targets == 2 + 3 + 4 and data.batch(0).tokens == 9 + 4 + 2 + 3
