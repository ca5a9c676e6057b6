"""A translation model learns a few sentences by heart; pairs are prepared page by page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcore import cli, translate_demo
from llmcore.models import EncoderDecoder, load
from llmcore.text import corpora
from llmcore.text.corpora import Pair
from llmcore.train import Recipe
from llmcore.train.translation import (
    Bitext,
    prepared_pairs,
    train_translation,
    translate,
    translation_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NOUNS = {"cat": "chat", "dog": "chien", "horse": "cheval", "bird": "oiseau"}
VERBS = {"sees": "voit", "hears": "entend", "feeds": "nourrit"}


def sentences() -> list[Pair]:
    """48 pairs, a page for each."""
    return [
        Pair(
            f"{a} {verb} {b}",
            f"The {a} {verb} a {b}.",
            f"Le {NOUNS[a]} {VERBS[verb]} un {NOUNS[b]}.",
        )
        for a in NOUNS
        for verb in VERBS
        for b in NOUNS
    ]


def test_translation_pairs_are_split_by_page() -> None:
    pairs = sentences()
    doubled = [*pairs, pairs[0], Pair("other page", pairs[1].source, pairs[1].target)]
    long = [Pair("long", "x " * 80, "y"), Pair("long 2", "z", "y " * 80)]
    bitext = prepared_pairs([*doubled, *long], vocab_size=300, held_out=0.3, longest=64)
    decode = bitext.tokenizer.decode
    learned = [(decode(source), decode(target)) for source, target in bitext.training]
    tested = [(pair.source, pair.target) for pair in bitext.tests]
    assert len(set(learned)) == len(learned) and not {s for s, _ in learned} & {
        s for s, _ in tested
    }
    assert set(learned) | set(tested) == {(pair.source, pair.target) for pair in pairs}
    with pytest.raises(ValueError, match="too few to hold out"):
        prepared_pairs(pairs[:1], vocab_size=300)


def test_translation_learns_32_pairs_by_heart(tmp_path: Path) -> None:
    pairs = sentences()
    whole = prepared_pairs(pairs, vocab_size=300, held_out=0.3)
    chosen = pairs[:32]
    bitext = Bitext(whole.tokenizer, whole.encoded(chosen), whole.tests)
    config = translation_config(whole.tokenizer, width=64, layers=1, feed_forward=128, dropout=0.0)
    recipe = Recipe(steps=90, learning_rate=6e-3, warm_up=10, beta2=0.98)
    model = train_translation(config, bitext, recipe, tmp_path, label_smoothing=0.0, quiet=True)
    sources = [pair.source for pair in chosen]
    expected = [pair.target for pair in chosen]
    assert translate(model, whole.tokenizer, sources) == expected
    assert translate(model, whole.tokenizer, sources[:4], beams=3) == expected[:4]
    again, tokenizer = load(tmp_path / "model")
    assert isinstance(again, EncoderDecoder)
    assert translate(again, tokenizer, sources[:4]) == expected[:4]


def test_translate_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpora, "pairs", lambda name: sentences() * 2)
    monkeypatch.setattr(
        translate_demo,
        "prepared_pairs",
        lambda p, vocab_size: prepared_pairs(p, vocab_size=300, held_out=0.3),
    )
    options = ["--steps", "4", "--width", "64", "--layers", "1", "--tests", "10"]
    status = cli.main(["demo", "translate", "--out", str(tmp_path), *options])
    out = capsys.readouterr().out
    assert out.count("  human   ") == 5 and "model: " in out
    if "no scores" not in out:
        assert status == 1 and "copying the source" in out and "NOT reached" in out
    if "no picture" not in out:
        assert (tmp_path / "attention.png").stat().st_size > 1000
    monkeypatch.setattr(corpora, "pairs", lambda name: sentences()[:1])
    assert cli.main(["demo", "translate", "--out", str(tmp_path), *options]) == 1
    assert "too few" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "reached"), [("target", True), ("source", False)])
def test_translate_demo_goal(found: str, reached: bool) -> None:
    pytest.importorskip("sacrebleu")
    pairs = sentences()
    assert translate_demo.show_scores(pairs, [getattr(p, found) for p in pairs]) is reached


def test_translation_loss_is_smoothed_in_training_only() -> None:
    from llmcore.train.objectives import Translation

    torch.manual_seed(0)
    whole = prepared_pairs(sentences(), vocab_size=300, held_out=0.3)
    config = translation_config(whole.tokenizer, width=64, layers=1, feed_forward=64, dropout=0.0)
    objective = Translation(EncoderDecoder(config), label_smoothing=0.5)
    ids = torch.tensor([[5, 6, 0]])
    inputs = {"source_ids": ids, "source_mask": ids >= 0, "target_ids": ids, "targets": ids}
    plain = float(objective.eval()(**inputs).detach())
    logits = objective.model(ids, ids)[0]
    expected = torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum")
    assert plain == pytest.approx(float(expected), rel=1e-5)
    assert float(objective.train()(**inputs).detach()) != pytest.approx(plain, rel=1e-3)
