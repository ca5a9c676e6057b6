"""Ends: stop strings wherever tokens' borders lie, pieces that never have to be taken back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.generate import generate, stream
from llmcore.generation.stopping import AnswerText, Stopping, read_stop
from llmcore.text import Tokenizer
from llmcore.text.tokenizer import _byte_alphabet

pytestmark = pytest.mark.usefixtures("one_thread")

MERGES = ["a b", "ab c", "b c", "c a", "Ã ¤"]
TOKENS = ["<|end|>", *_byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
TOKENIZER = Tokenizer.from_bpe(TOKENS, MERGES, ["<|end|>"], eos="<|end|>")


def plain_cut(text, stops):
    """The definition: character after character, until one completes a stop string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def cuts(text, points):
    """The tokens of a text that is cut at these points first, so that they vary."""
    edges = sorted({0, len(text), *(point % (len(text) + 1) for point in points)})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    return [token for part in parts for token in TOKENIZER.encode(part)]


@given(
    st.text("abcä😀", max_size=24),
    st.lists(st.text("abcä😀", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 100), max_size=6),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_end_the_text(text, stops, points):
    whole, stopped = plain_cut(text, stops)
    answer = AnswerText(TOKENIZER, stops)
    pieces = []
    for token in cuts(text, points):
        answer.push(token)
        pieces.append(answer.take())
        # Nothing is shown that isn't certain, and nothing that is certain is held back.
        assert whole.startswith("".join(pieces))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    assert answer.stopped == stopped
    assert "".join(pieces) == whole


def test_stop_strings_hold_back_no_more_than_needed():
    answer = AnswerText(TOKENIZER, ["\n\nUser:"])
    shown = []
    for token in TOKENIZER.encode("Yes.\n\nUsed"):
        answer.push(token)
        shown.append(answer.take())
    assert shown == ["Y", "e", "s", ".", "", "", "", "", "", "\n\nUsed"]


def test_half_characters_wait_for_the_other_half():
    answer = AnswerText(TOKENIZER)
    first, second, *rest = TOKENIZER.encode("😀")
    answer.push(first)
    assert answer.take() == "" and rest
    answer.push(second)
    assert answer.finish() == "�"


def test_ended_says_which_sequences_end():
    stopping = Stopping([0, 7], ["ab"], TOKENIZER, batch=3)
    a, b = TOKENIZER.encode("a") + TOKENIZER.encode("b")
    assert stopping.ended([0, 1, 2], [a, a, 7]) == [False, False, True]
    assert stopping.ended([1, 0], [b, 0]) == [True, True]
    assert [text.finish() for text in stopping.texts] == ["a", "", ""]


@pytest.mark.parametrize(
    ("stop", "ids", "texts"),
    [
        (None, (1, 2), ()),
        (5, (5,), ()),
        ([5, 6], (5, 6), ()),
        ((), (), ()),
        ("x", (1, 2), ("x",)),
        (["x", "yz"], (1, 2), ("x", "yz")),
        ([5, "x"], (5,), ("x",)),
    ],
)
def test_stop_is_ids_and_texts(stop, ids, texts):
    assert read_stop(stop, (1, 2)) == (ids, texts)


def test_stop_refuses(tiny_decoder):
    model, ids = tiny_decoder(), torch.tensor([[5, 6]])
    with pytest.raises(TypeError, match=r"stop takes token ids and texts, got \(1.5,\)"):
        generate(model, ids, max_new_tokens=1, stop=[1.5])
    with pytest.raises(ValueError, match="to find 'x' in the answer, tokenizer= is needed"):
        generate(model, ids, max_new_tokens=1, stop="x")
    with pytest.raises(ValueError, match="an empty text would end every answer"):
        generate(model, ids, max_new_tokens=1, stop="", tokenizer=TOKENIZER)


def test_generate_stops_at_texts(tiny_decoder):
    """Each row at its own place; ids keep the token that completed it, the text ends before it."""
    model = tiny_decoder(vocab_size=len(TOKENIZER), eos_ids=(0,))
    ids = torch.randint(1, 256, (4, 6), generator=torch.Generator().manual_seed(0))
    free = generate(model, ids, max_new_tokens=30, stop=())[:, 6:].tolist()
    texts = [TOKENIZER.decode(row) for row in free]
    stops = [texts[0][5:7], texts[2][11:13]]
    options = {"max_new_tokens": 30, "stop": [0, *stops]}
    result = generate(model, ids, tokenizer=TOKENIZER, **options)[:, 6:].tolist()
    for b in range(4):
        answer, count = AnswerText(TOKENIZER, stops), 0
        for token in free[b]:
            count += 1
            if token == 0:
                break
            answer.push(token)
            if answer.stopped:
                break
        assert result[b][:count] == free[b][:count]
        assert set(result[b][count:]) <= {0}
        streamed = "".join(stream(model, ids[b : b + 1], TOKENIZER, **options))
        assert streamed == answer.finish()
