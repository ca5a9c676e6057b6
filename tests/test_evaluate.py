"""Perplexity: every token but the first is predicted once, from what its window holds."""

import math
from pathlib import Path

import pytest
import torch

from llmcore import cli, model_arguments
from llmcore.evaluate import Likelihood, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pair(tiny_decoder, tiny_tokenizer):
    return tiny_decoder(vocab_size=len(tiny_tokenizer)), tiny_tokenizer


@torch.no_grad()
def plain_nats(model, ids, window, stride):
    """The definition: each token in the first window that holds it, in float64."""
    model = model.double()
    total, starts = 0.0, range(0, len(ids), stride)
    for place in range(1, len(ids)):
        start = next(s for s in starts if s <= place < s + window)
        context = torch.tensor([ids[start:place]])
        total -= float(model(context)[0, -1].log_softmax(dim=-1)[ids[place]])
    model.float()
    return total


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 1), (2, 1), (64, 32)])
@pytest.mark.parametrize("length", [2, 16, 17, 40])
def test_evaluate_is_the_plain_definition(pair, window, stride, length):
    model, tokenizer = pair
    ids = torch.randint(2, 266, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    found = evaluate(model, tokenizer, ids, window=window, stride=stride)
    expected = plain_nats(model, ids, window, stride)
    assert found.tokens == length - 1
    assert found.bytes == len(tokenizer.decode_bytes(ids[1:]))
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / (length - 1)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / found.bytes, rel=1e-5)


def test_evaluate_text_and_bytes(pair):
    model, tokenizer = pair
    text = "the hat and the äöü 12"
    found = evaluate(model, tokenizer, text)
    assert found == evaluate(model, tokenizer, text.encode())
    assert found.bytes == len(text.encode()) - len(
        tokenizer.decode_bytes(tokenizer.encode(text)[:1])
    )


def test_evaluate_nothing(pair):
    for text in ("", "t"):
        found = evaluate(*pair, text)
        assert found == Likelihood() and math.isnan(found.perplexity)
        assert math.isnan(found.bits_per_byte)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be from 2 to the context of 64, got 1"),
        ({"window": 65}, "got 65"),
        ({"window": 8, "stride": 8}, "stride must be from 1 to window - 1, 7, got 8"),
        ({"stride": 0}, "got 0"),
    ],
)
def test_evaluate_refuses(pair, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*pair, "the hat", **options)


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("the hat and the hat\n" * 5)
    paths[1].write_text("12 and 12")
    return [str(path) for path in paths]


def test_evaluate_command(pair, texts, monkeypatch, capsys):
    model, tokenizer = pair

    def load(name, weights):
        assert name == "somewhere"
        if weights == "int9":
            raise ValueError("weights: int9 is unknown")
        if weights == "int8":
            with torch.no_grad():
                model.norm.weight.mul_(1.5)
        return model, tokenizer

    monkeypatch.setattr(model_arguments, "load", load)
    parts = [evaluate(model, tokenizer, Path(path).read_bytes()) for path in texts]
    total = parts[0] + parts[1]
    arguments = ["evaluate", "somewhere", "--text", *texts]
    assert cli.main([*arguments, "--weights", "fp32", "int8"]) == 0
    first, _, _, plain, packed = capsys.readouterr().out.splitlines()
    assert first == f"{total.tokens} tokens, {total.bytes} bytes predicted"
    assert plain.split() == ["fp32", f"{total.perplexity:.4f}", f"{total.bits_per_byte:.5f}"]
    name, perplexity, _, change = packed.split()
    assert name == "int8"
    assert float(change[:-1]) == pytest.approx(
        100 * (float(perplexity) / total.perplexity - 1), abs=1e-2
    )
    assert cli.main([*arguments, "--weights", "int9"]) == 1
    assert "llmcore evaluate: weights: int9 is unknown" in capsys.readouterr().err


def test_evaluate_command_refuses(pair, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_arguments, "load", lambda name, weights: pair)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for arguments, message in (
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
        (["--text", str(empty)], "nothing to predict"),
        (["--text", *texts, "--stride", "100"], "a.txt: stride must be from 1"),
    ):
        assert cli.main(["evaluate", "somewhere", *arguments]) == 1
        assert message in capsys.readouterr().err
