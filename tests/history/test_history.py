"""n-grams by the formula, recurrent networks token by token, and gradients that vanish."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmcore.history import Ngram, Recurrent, RecurrentConfig
from llmcore.history.gradients import gradient_shares
from llmcore.history.ngram import NgramConfig
from llmcore.models import Decoder, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
V = 7


def documents(seed: int, count: int, longest: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[0, *draw.integers(1, V, draw.integers(1, longest)).tolist()] for _ in range(count)]


def plain_kneser_ney(texts: list[list[int]], order: int, history: list[int]) -> np.ndarray:
    """p(w | history) by the recursion of the module's docstring, one n-gram after the other."""
    counts: Counter[tuple[int, ...]] = Counter()
    before: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for text in texts:
        for n in range(1, order + 1):
            for i in range(len(text) - n + 1):
                gram = tuple(text[i : i + n])
                counts[gram] += 1
                if i:
                    before[gram].add(text[i - 1])

    def c(gram: tuple[int, ...]) -> int:
        if len(gram) == order or (gram[0] == 0 and len(gram) > 1):
            return counts[gram]
        return len(before[gram])

    p = np.full(V, 1 / V)
    for n in range(1, min(order, len(history) + 1) + 1):
        grams = [gram for gram in counts if len(gram) == n and c(gram)]
        often = Counter(c(gram) for gram in grams)
        y = often[1] / (often[1] + 2 * often[2]) if often[1] else 0.0
        discount = {0: 0.0}
        for k in (1, 2, 3):
            discount[k] = k - (k + 1) * y * often[k + 1] / often[k] if often[k] else 0.0
        if not all(often[k] for k in (1, 2, 3, 4)) or min(discount[k] for k in (1, 2, 3)) <= 0:
            discount = {0: 0.0, 1: 0.5, 2: 0.5, 3: 0.5}
        context = tuple(history[len(history) - n + 1 :])
        here = np.array([c((*context, w)) for w in range(V)])
        if not here.sum():
            continue
        taken = np.array([discount[min(k, 3)] for k in here])
        p = (here - taken) / here.sum() + taken.sum() / here.sum() * p
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_is_the_recursion(order: int) -> None:
    texts = documents(0, 40, 9)
    model = Ngram(NgramConfig(order, V, separator=0), np.concatenate(texts))
    for text in documents(1, 5, 8):
        found = model(torch.tensor([text]))[0].exp().numpy()
        for t in range(len(text)):
            expected = plain_kneser_ney(texts, order, text[: t + 1][-(order - 1) or len(text) :])
            if order == 1:
                expected = plain_kneser_ney(texts, 1, [])
            np.testing.assert_allclose(found[t], expected, rtol=1e-5)


def test_ngram_sums_to_one_and_forgets_other_documents() -> None:
    texts = documents(0, 40, 9)
    model = Ngram(NgramConfig(3, V, separator=0), np.concatenate(texts))
    ids = torch.tensor([[1, 2, 3, 0, 4, 5, 6]])
    p = model(ids).exp()
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(1, 7))
    assert torch.equal(p[0, 3:], model(torch.tensor([[6, 6, 6, 0, 4, 5, 6]])).exp()[0, 3:])
    assert torch.equal(p[0, 3:], model(ids[:, 3:]).exp()[0])
    targets = torch.tensor([[2, 3, 0, 4, -100, 6, 1]])
    kept = [-math.log(p[0, t, w]) for t, w in enumerate(targets[0].tolist()) if w >= 0]
    assert float(model.loss(ids, targets)) == pytest.approx(sum(kept) / 6, rel=1e-5)


def test_ngram_refuses() -> None:
    with pytest.raises(ValueError, match="order must be at least 1"):
        NgramConfig(0, 10, 0)
    with pytest.raises(ValueError, match="more n-grams than 64 bits hold"):
        NgramConfig(6, 2048, 0)


def small(kind: Any, **changes: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(RecurrentConfig(kind, **{"vocab_size": 11, "width": 8, **changes}))


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_recurrent_documents_and_loss(kind: Any) -> None:
    """Packed documents are documents by themselves; the loss is the logits' cross-entropy; what
    comes later changes nothing before."""
    model = small(kind, layers=2)
    ids = torch.randint(11, (2, 9))
    cuts = torch.tensor([0, 4, 9, 15, 18])
    hidden = model.hidden(ids, cuts)
    assert torch.equal(hidden[0, :4], model.hidden(ids[:1, :4])[0]) or torch.allclose(
        hidden[0, :4], model.hidden(ids[:1, :4])[0], atol=1e-6
    )
    torch.testing.assert_close(hidden[0, 4:], model.hidden(ids[:1, 4:])[0])
    torch.testing.assert_close(hidden[1, 6:], model.hidden(ids[1:, 6:])[0])
    targets = ids.roll(-1, 1).clone()
    targets[0, 3] = -100
    expected = F.cross_entropy(model(ids, cuts).flatten(0, 1), targets.flatten(), reduction="sum")
    found = model.loss(ids, targets, cu_seqlens=cuts, reduction="sum")
    torch.testing.assert_close(found, expected)
    changed = ids.clone()
    changed[:, 6:] = 3
    assert torch.equal(model(ids)[:, :6], model(changed)[:, :6])


def test_recurrent_forget_bias_and_config() -> None:
    plain, open_ = small("lstm"), small("lstm", forget_bias=3.0)
    difference = open_.layers.bias_ih_l0 - plain.layers.bias_ih_l0
    assert difference.tolist() == [0.0] * 8 + [3.0] * 8 + [0.0] * 16
    with pytest.raises(ValueError, match="kind must be one of rnn, gru, lstm, got 'xlstm'"):
        small("xlstm")
    with pytest.raises(ValueError, match="width must be at least 1"):
        small("rnn", width=0)


def test_gradients_vanish_where_they_must() -> None:
    """By a linear recurrence, where the share is known, and in order over the kinds of network."""
    model = small("rnn", width=4)
    model.layers.nonlinearity = "relu"
    model.layers.mode = "RNN_RELU"
    with torch.no_grad():
        for name, parameter in model.layers.named_parameters():
            parameter.zero_()
            if name.startswith("weight"):
                parameter.copy_(torch.eye(4) * (0.5 if "hh" in name else 1.0))
        model.embedding.weight.abs_()
    shares = gradient_shares(model, 12)
    torch.testing.assert_close(shares, 0.5 ** (torch.arange(12.0, dtype=torch.float64) - 1))
    assert next(model.parameters()).dtype == torch.float32
    far = {kind: float(gradient_shares(small(kind, width=32), 97)[64]) for kind in ("rnn", "lstm")}
    far["open"] = float(gradient_shares(small("lstm", width=32, forget_bias=3.0), 97)[64])
    shape = {"vocab_size": 11, "width": 32, "layers": 2, "heads": 2, "kv_heads": 2}
    config = TransformerConfig(**shape, head_width=16, feed_forward=64, context_length=97)
    far["transformer"] = float(gradient_shares(Decoder(config), 97)[64])
    assert far["rnn"] < 1e-8 and far["lstm"] < 1e-8
    assert far["open"] > 1e-2 and far["transformer"] > 0.3
