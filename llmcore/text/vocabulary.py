"""Tokenizers trained on your own text: byte-pair encoding, whole words, single bytes.

All three hold a token for every byte, so that any bytes make the round trip exactly:

    bytes   256 tokens and no others
    bpe     the most frequent pair of neighbouring tokens becomes a token, again and again
            (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, over GPT-2's bytes)
    words   the most frequent words; a word that isn't among them is spelled in bytes

A word is what GPT-2's pattern cuts text into: a run of letters, of digits or of other signs, with
the space before it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmcore.text.tokenizer import Tokenizer

END = "<|end|>"
"""What separates documents, and ends a text; the first token of every vocabulary made here."""


def byte_tokenizer(special: Sequence[str] = (END,)) -> Tokenizer:
    """A token for each of the 256 bytes, behind the special ones."""
    return _tokenizer(models.BPE(vocab=_numbered(special, []), merges=[]), special)


def train_bpe(
    texts: Iterable[str], size: int, special: Sequence[str] = (END,), *, min_frequency: int = 2
) -> Tokenizer:
    """A byte-level BPE of `size` tokens, special ones and the 256 bytes among them.

    It has fewer when the texts have no pair left that occurs `min_frequency` times. ValueError for
    a size that has no place for the bytes.
    """
    _check(size, special)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return _tokenizer(inner.model, special)


def train_words(texts: Iterable[str], size: int, special: Sequence[str] = (END,)) -> Tokenizer:
    """The most frequent words of the texts, `size` tokens with the special ones and the bytes.

    Words that are equally frequent come in their alphabetical order. ValueError as train_bpe.
    """
    _check(size, special)
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(text))
    room = size - len(special) - len(cut.alphabet())
    longer = ((word, count) for word, count in counts.items() if len(word) > 1)
    ranked = sorted(longer, key=lambda pair: (-pair[1], pair[0]))
    vocabulary = _numbered(special, [word for word, _ in ranked[:room]])
    # A whole word is looked up before merges are asked, and there are none: the rest are bytes.
    return _tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True), special)


def _check(size: int, special: Sequence[str]) -> None:
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(special)
    if size < least:
        raise ValueError(
            f"size must be at least {least}, for 256 bytes and {len(special)} special tokens, "
            f"got {size}"
        )


def _numbered(special: Sequence[str], words: Sequence[str]) -> dict[str, int]:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    return {token: i for i, token in enumerate(tokens)}


def _tokenizer(model: models.Model, special: Sequence[str]) -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    end = special[0] if special else None
    return Tokenizer(inner, eos=end, pad=end)
