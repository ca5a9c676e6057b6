"""WordPieces: batches of texts and pairs as BERT reads them."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llmcore.text import Tokenizer, WordPieces

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##known", "the", "dog", "##s"]


@pytest.fixture
def inner():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def test_word_pieces_encode_and_decode(inner):
    words = WordPieces(inner)
    assert words.encode("The UNKNOWN dogs bark") == [7, 5, 6, 8, 9, 1]
    assert words.decode([7, 8, 9]) == "the dogs"
    assert (words.cls_id, words.sep_id, words.pad_id, words.mask_id) == (2, 3, 0, 4)
    assert len(words) == len(WORDS)


def test_word_pieces_batch_of_texts_and_pairs(inner):
    ids, mask, types = WordPieces(inner).batch(["the dogs", ("dog", "the unknown dog")])
    assert ids.tolist() == [[2, 7, 8, 9, 3, 0, 0, 0], [2, 8, 3, 7, 5, 6, 8, 3]]
    assert mask.tolist() == [[True] * 5 + [False] * 3, [True] * 8]
    assert types.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]


def test_word_pieces_cuts_the_longer_one(inner):
    ids, _, types = WordPieces(inner).batch([("dog", "the unknown dogs")], limit=6)
    assert ids.tolist() == [[2, 8, 3, 7, 5, 3]]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="limit 1 leaves no room"):
        WordPieces(inner).batch(["dog"], limit=1)
    with pytest.raises(ValueError, match="at least one text"):
        WordPieces(inner).batch([])


def test_word_pieces_saved_and_read(inner, tmp_path):
    WordPieces(inner, '{"do_lower_case": true}').save(tmp_path)
    again = WordPieces.from_folder(tmp_path)
    assert again.encode("the Dogs") == [7, 8, 9]
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"do_lower_case": true}'


def test_word_pieces_refuses_other_tokenizers(inner, tiny_tokenizer):
    with pytest.raises(ValueError, match="a WordPiece tokenizer is accepted, got model BPE"):
        WordPieces(tiny_tokenizer._inner)
    with pytest.raises(ValueError, match="a byte-level BPE tokenizer is accepted"):
        Tokenizer(inner)
    bare = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"lacks \[SEP\]"):
        WordPieces(bare)
