"""Pre-training from text to a model that can be loaded; its command; the data command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcore import cli, data_inspect_command
from llmcore.models import Decoder, Encoder, load
from llmcore.text import corpora, masking
from llmcore.text.data import IGNORED
from llmcore.text.masking import CLS, MASK, SEP, MaskedPairs
from llmcore.train import checkpoint, pretrain
from llmcore.train.preparation import Preparation, prepare
from llmcore.train.pretrain import PRESETS, Options, changed

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = corpora.documents("pydoc")


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(Preparation(("pydoc",), vocab_size=400, special=masking.SPECIAL), folder)
    return folder


def test_preparation_keeps_the_parts_apart(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    texts = [f"text {i}: " + TEXTS[i % 40] for i in range(60)]
    lines = [json.dumps(text) for text in [*texts, texts[3], texts[5] + " "]]
    source.write_text("\n".join(lines))
    settings = Preparation((str(source),), vocab_size=300, held_out=0.2, near_duplicates=1.0)
    prepared = prepare(settings, tmp_path / "data")
    counts = prepared.counts
    assert counts["documents"] == 62 and counts["copies"] == 2 and counts["near_copies"] == 0
    assert counts["training_documents"] + counts["validation_documents"] == 60
    decode = prepared.tokenizer.decode
    held_out = {decode(ids[1:]) for ids in prepared.validation_documents()}
    shards = prepared.training
    learned = {decode(shards.document(i)[1:]) for i in range(len(shards.starts))}
    assert not held_out & learned and len(held_out) + len(learned) == 60
    assert sum(len(text.encode()) for text in held_out) == counts["validation_bytes"]
    again = prepare(settings, tmp_path / "data")
    assert again.counts == counts
    with pytest.raises(ValueError, match="prepared with other vocab_size"):
        prepare(Preparation((str(source),), vocab_size=301, held_out=0.2), tmp_path / "data")
    source.write_text("\n".join(lines[:50]))
    with pytest.raises(ValueError, match="prepared with other texts"):
        prepare(settings, tmp_path / "data")
    source.write_text(lines[0])
    with pytest.raises(ValueError, match="1 documents are too few"):
        prepare(settings, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_masked_pairs(prepared_folder: Path) -> None:
    prepared = prepare(
        Preparation(("pydoc",), vocab_size=400, special=masking.SPECIAL), prepared_folder
    )
    data = MaskedPairs(prepared.training, prepared.tokenizer, length=64, rows=16)
    special = prepared.tokenizer.special
    hidden = targets = changed_to = follows = 0
    stream = prepared.training.read(0, len(prepared.training))
    for position in range(20):
        batch = data.batch(position)
        inputs = batch.inputs
        ids, chosen = inputs["ids"], inputs["targets"] != IGNORED
        whole = torch.where(chosen, inputs["targets"], ids)
        assert ids.shape[1] <= 64 and batch.targets == int(chosen.sum())
        assert batch.tokens == int(inputs["attention_mask"].sum())
        assert (ids[:, 0] == special[CLS]).all()
        assert ((whole == special[SEP]).sum(dim=1) == 2).all()
        assert not (whole[chosen] <= special[MASK]).any()
        for row, types, mask, is_next in zip(
            whole, inputs["token_types"], inputs["attention_mask"], inputs["is_next"], strict=True
        ):
            tokens = row[mask].tolist()
            first = tokens.index(special[SEP])
            assert types[mask].tolist() == [0] * (first + 1) + [1] * (len(tokens) - first - 1)
            joined = np.array(tokens[1:first] + tokens[first + 1 : -1])
            windows = np.lib.stride_tricks.sliding_window_view(stream, len(joined))
            assert bool((windows == joined).all(axis=1).any()) == bool(is_next)
        hidden += int((ids[chosen] == special[MASK]).sum())
        changed_to += int(((ids != whole) & (ids != special[MASK])).sum())
        targets += batch.targets
        follows += int(inputs["is_next"].sum())
    assert hidden / targets == pytest.approx(0.8, abs=0.05)
    assert changed_to / targets == pytest.approx(0.1, abs=0.04)
    assert follows / 320 == pytest.approx(0.5, abs=0.12)
    again = MaskedPairs(prepared.training, prepared.tokenizer, length=64, rows=16).batch(19)
    assert torch.equal(again.inputs["ids"], data.batch(19).inputs["ids"])
    with pytest.raises(ValueError, match="length must be at least 11"):
        MaskedPairs(prepared.training, prepared.tokenizer, length=10, rows=1)


@pytest.mark.parametrize("preset", ["smoke", "tiny-masked"])
def test_pretrain_recomputed_blocks_give_the_same_run(
    preset: str, prepared_folder: Path, tmp_path: Path
) -> None:
    """And the checkpoint, like the model, is a folder that `load` takes."""
    prepared = prepare(
        Preparation(("pydoc",), vocab_size=400, special=masking.SPECIAL), prepared_folder
    )
    small = changed(PRESETS[preset], recipe={"steps": 3, "warm_up": 1}, rows=2, length=32)
    models = [
        pretrain.pretrain(
            small, prepared, tmp_path / str(recompute), Options(recompute=recompute, quiet=True)
        )
        for recompute in (False, True)
    ]
    assert isinstance(models[0], Decoder if preset == "smoke" else Encoder)
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)
    [last] = checkpoint.found_in(tmp_path / "False" / "checkpoints")
    ids = torch.tensor([[5, 6, 7]])
    expected = models[0](ids)
    for folder in (last, tmp_path / "False" / "model"):
        model, tokenizer = load(folder)
        torch.testing.assert_close(model(ids), expected)
        assert len(tokenizer) == 400


def test_pretrain_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "--preset", "smoke", "--steps", "6", "--rows", "4", "--out", "run"]
    assert cli.main([*command, "--data", "pydoc", "--average", "0.5"]) == 0
    shown = capsys.readouterr()
    for name in ("transformer", "LSTM", "GRU", "3-gram, Kneser-Ney"):
        assert name in shown.out
    assert "The best here: " in shown.out and "A sample, behind [" in shown.out
    assert "step      6/6" in shown.err and "tokens/s" in shown.err
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert records[-1]["validation_loss"] < math.log(512) + 0.2
    model, _ = load("run/model")
    assert isinstance(model, Decoder)
    # The same command again finds everything done.
    assert cli.main([*command, "--data", "pydoc", "--average", "0.5", "--no-rivals"]) == 0
    assert cli.main([*command, "--learning-rate", "1"]) == 1
    assert "run with learning_rate 0.003, this one has 1.0" in capsys.readouterr().err
    shutil.rmtree("run")
    assert cli.main([*command, "--data", "nothing"]) == 1
    assert "neither a file nor a folder nor a corpus" in capsys.readouterr().err


def test_data_inspect_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["data", "inspect", "pydoc", "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{len(TEXTS)} documents" in out and "PSF" in out and "near copies" in out
    (tmp_path / "a.txt").write_text("caf\u00e9 au lait")
    assert cli.main(["data", "inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 documents, 3 words, 13 bytes" in out and "[0] caf\u00e9 au lait" in out
    assert "\u00e9" in out.splitlines()[-3]
    assert cli.main(["data", "inspect", "nowhere"]) == 1
    pairs = [corpora.Pair("a", "one two", "un deux"), corpora.Pair("b", "one two", "un, deux")]
    data_inspect_command.show_pairs([*pairs, pairs[0]], 1, 0)
    out = capsys.readouterr().out
    assert "3 pairs on 2 pages" in out and "copies: 1" in out and "several targets: 1" in out
