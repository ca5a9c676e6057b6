"""Text and bytes go through unchanged, typed markers stay text, and streams join to the whole."""

import itertools
import json

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.text import Tokenizer
from llmcore.text.tokenizer import _LETTER_OF

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\ttabs \r\n",
    "In 2024, 1234567890 + 1/2",
    "naïve café — “quoted” 東京 한국어 العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "don't can't I'LL we've",
    "\x00\x01\x7f\ufeff\ufffd\u2028",
    "def f(x):\n    return x**2  # ok\n",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_pair):
    return smollm2_pair[1]


@pytest.fixture
def byte_tokenizer(tiny_tokenizer):
    return tiny_tokenizer


# SmolLM2's vocabulary has no token for some bytes: such characters can't be held by it.
HOLDABLE = st.text(
    st.characters(codec="utf-8", exclude_characters="\x04\x06\x13\x14\x16\x1d").filter(
        lambda c: not {0xF1, 0xF2} & set(c.encode())
    )
)
MARKERS = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>"])
SPEECH = st.lists(HOLDABLE | MARKERS).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=SPEECH)
def test_tokenizer_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())


@settings(max_examples=200, deadline=None)
@given(text=SPEECH)
def test_tokenizer_round_trip_with_special_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


@settings(max_examples=200, deadline=None)
@given(data=st.binary())
def test_tokenizer_round_trip_of_any_bytes(data):
    tokenizer = byte_level()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def byte_level() -> Tokenizer:
    """All 256 bytes and one merge that ends inside a character."""
    euro = [_LETTER_OF[byte] for byte in "€".encode()]
    tokens = [*_LETTER_OF.values(), euro[0] + euro[1], "<|end|>"]
    return Tokenizer.from_bpe(tokens, [f"{euro[0]} {euro[1]}"], ["<|end|>"])


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_tokenizer_stream_of_any_ids_joins_to_the_whole(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=SPEECH)
def test_tokenizer_stream_of_text_never_breaks_a_character(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert stream.finish() == ""
    assert "".join(pieces) == text
    assert sum("\ufffd" in piece for piece in pieces) <= text.count("\ufffd")


def test_tokenizer_stream_waits_for_whole_characters():
    tokenizer = byte_level()
    stream = tokenizer.stream()
    ids = tokenizer.encode("a€b")
    assert [stream.push(token) for token in ids] == ["a", "", "€", "b"]
    assert stream.finish() == ""
    assert stream.push(ids[1]) == ""
    assert stream.finish() == "\ufffd"


@pytest.fixture(scope="module")
def theirs(smollm2_files):
    """transformers' own reading of the same GGUF file."""
    transformers = pytest.importorskip("transformers")
    folder, _, name = smollm2_files.rpartition("/")
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_equals_the_one_of_transformers(tokenizer, theirs, text):
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def ranks(tokenizer):
    merges = json.loads(tokenizer._inner.to_str())["model"]["merges"]
    return {tuple(pair): rank for rank, pair in enumerate(merges)}


def plain_encode(text, ranks, vocabulary):
    """The definition: llama.cpp's pattern for "smollm", then the best merge again and again."""
    regex = pytest.importorskip("regex")
    gpt2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for part in regex.split(r"(\p{N})", text):
        for word in regex.findall(gpt2, part):
            letters = [_LETTER_OF[byte] for byte in word.encode()]
            while True:
                pairs = list(itertools.pairwise(letters))
                i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], 1e9), default=None)
                if i is None or pairs[i] not in ranks:
                    break
                letters[i : i + 2] = [letters[i] + letters[i + 1]]
            ids += [vocabulary[letter] for letter in letters]
    return ids


# Up to U+2FFF: beyond, Unicode versions may disagree on what a letter is.
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x2FFF)))
def test_tokenizer_equals_the_plain_definition(tokenizer, ranks, text):
    vocabulary = tokenizer._inner.get_vocab()
    assert tokenizer.encode(text) == plain_encode(text, ranks, vocabulary)


@pytest.mark.parametrize("text", ["½ⅷ², 3 ④ x٣", "it's John's 'dog'", "a  b   c\n\n d \t"])
def test_tokenizer_equals_the_plain_definition_on_edges(tokenizer, ranks, text):
    vocabulary = tokenizer._inner.get_vocab()
    assert tokenizer.encode(text) == plain_encode(text, ranks, vocabulary)


def test_tokenizer_splits_digits(tokenizer, tiny_tokenizer):
    assert len(tiny_tokenizer.encode("12")) == 2  # in spite of its merge of 1 and 2
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a 2024")] == ["a", " ", *"2024"]


def test_tokenizer_reads_special_tokens_only_when_asked(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|>"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert special == [1, *tokenizer.encode("user\nhi"), 2]
    assert not {1, 2} & set(plain)
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    theirs = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    assert special == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fine\x04", r"no token for U\+0004"),
        ("\U00080000", r"no token for U\+80000"),
        (b"\xff", "no token for the byte 0xFF"),
        ("half \ud83d", "surrogates not allowed"),
    ],
)
def test_tokenizer_names_what_it_cannot_hold(tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [49152, -1])
def test_tokenizer_names_ids_that_stand_for_nothing(tokenizer, token):
    with pytest.raises(ValueError, match=f"token {token} isn't in the vocabulary of 49152"):
        tokenizer.decode([token])


def test_tokenizer_adds_special_tokens(byte_tokenizer):
    size = len(byte_tokenizer)
    assert byte_tokenizer.add_special("<USER>", "<|end|>", "<EOS>") == [size, 0, size + 1]
    assert len(byte_tokenizer) == size + 2
    assert byte_tokenizer.encode("<USER>the", allow_special=True)[0] == size
    assert size not in byte_tokenizer.encode("<USER>the")
    assert byte_tokenizer.decode([size, size + 1]) == "<USER><EOS>"
    with pytest.raises(ValueError, match="can't be empty"):
        byte_tokenizer.add_special("")


def test_tokenizer_longest_special_token_wins(byte_tokenizer):
    short, long = byte_tokenizer.add_special("<a>", "<a><b>")
    assert byte_tokenizer.encode("<a><b><a>", allow_special=True) == [long, short]


def test_tokenizer_batch(byte_tokenizer):
    left, mask = byte_tokenizer.batch(["the", "a b", ""])
    assert left.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert left[~mask].tolist() == [byte_tokenizer.pad_id] * 5
    assert left[0, 2:].tolist() == byte_tokenizer.encode("the")
    right, mask = byte_tokenizer.batch(["the", "a b"], side="right")
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert right[mask].tolist() == byte_tokenizer.encode("the") + byte_tokenizer.encode("a b")
    with pytest.raises(ValueError, match='side must be "left" or "right"'):
        byte_tokenizer.batch(["a"], side="top")
    with pytest.raises(ValueError, match="at least one text"):
        byte_tokenizer.batch([])


def test_tokenizer_save_and_read(byte_tokenizer, tmp_path):
    byte_tokenizer.add_special("<USER>")
    byte_tokenizer.save(tmp_path)
    back = Tokenizer.from_folder(tmp_path)
    text = "then<USER> the 12<|end|>"
    for allow in (False, True):
        assert back.encode(text, allow_special=allow) == byte_tokenizer.encode(
            text, allow_special=allow
        )
    assert (back.bos, back.eos, back.pad) == (None, "<|end|>", "<|end|>")
    assert back.chat_template == byte_tokenizer.chat_template


def test_tokenizer_reads_hugging_face_settings(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path)
    found = {
        "eos_token": {"content": "<|end|>", "lstrip": False},
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "yes"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(found))
    back = Tokenizer.from_folder(tmp_path)
    assert (back.eos, back.pad, back.pad_id, back.chat_template) == ("<|end|>", None, 0, "yes")
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert Tokenizer.from_folder(tmp_path).chat_template == "newer"


def test_tokenizer_template_markers_are_special_even_unmarked(byte_tokenizer):
    """Some tokenizer files don't mark a chat marker as special; typed, it must stay text."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer._inner.to_str())
    inner.add_tokens(["<turn>", "hello"])
    loose = Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))
    assert inner.token_to_id("<turn>") in loose.encode("<turn>")
    strict = Tokenizer(inner, chat_template="<turn>{{ messages[0]['content'] }}")
    assert inner.token_to_id("<turn>") not in strict.encode("<turn>")
    assert strict.encode("<turn>", allow_special=True) == [inner.token_to_id("<turn>")]
    assert strict.encode("hello") == [inner.token_to_id("hello")]


def test_tokenizer_refuses_other_kinds():
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    words.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="got model WordPiece with decoder WordPiece"):
        Tokenizer(words)
    with pytest.raises(ValueError, match="1 tokens appear twice"):
        Tokenizer.from_bpe(["a", "b", "a"], [], [])
