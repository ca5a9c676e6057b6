"""BERT's tokenizer: words, and pieces of the words that it doesn't know.

Unlike our byte-level tokenizer it forgets: upper case, accents and spaces, and what it has no piece
for is [UNK]. So there is a way into ids, for encoders, and only a readable way back.
"""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from llmcore.text.tokenizer import SETTINGS_FILE, TOKENIZER_FILE


class WordPieces:
    """A WordPiece vocabulary with [CLS], [SEP], [PAD] and [MASK] (Devlin et al., 2018, section 3).

    A text is `[CLS] text [SEP]`, a pair `[CLS] text [SEP] other [SEP]`; the first of a pair, with
    its [CLS] and [SEP], has the token type 0, the second 1.
    """

    def __init__(self, inner: tokenizers.Tokenizer, settings: str | None = None) -> None:
        """settings: the contents of tokenizer_config.json, kept as they are.

        ValueError when `inner` isn't WordPiece, or has no such special tokens.
        """
        if not isinstance(inner.model, tokenizers.models.WordPiece):
            raise ValueError(
                f"a WordPiece tokenizer is accepted, got model {type(inner.model).__name__}"
            )
        inner.no_padding()
        inner.no_truncation()
        self._inner, self._settings = inner, settings
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (
            self._special(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "WordPieces":
        """tokenizer.json, with tokenizer_config.json where it is."""
        path, settings = Path(folder) / TOKENIZER_FILE, Path(folder) / SETTINGS_FILE
        inner = tokenizers.Tokenizer.from_file(str(path))
        return cls(inner, settings.read_text(encoding="utf-8") if settings.is_file() else None)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json if there was one, into a folder."""
        self._inner.save(str(Path(folder) / TOKENIZER_FILE))
        if self._settings is not None:
            (Path(folder) / SETTINGS_FILE).write_text(self._settings, encoding="utf-8")

    def __len__(self) -> int:
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The text's own tokens, without [CLS] and [SEP]."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text, without special tokens."""
        return self._inner.decode(list(ids))

    def batch(
        self, texts: Sequence[str | tuple[str, str]], *, limit: int = 512
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Texts, or pairs of them, as one batch: ids (B, T) int64, attention_mask (B, T) bool and
        token_types (B, T) int64, padded on the right.

        limit  tokens of a row at most: longer texts, of a pair the longer one, lose their end
        """
        if not texts:
            raise ValueError("a batch needs at least one text")
        rows = [self._row(text, limit) for text in texts]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        types = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, kinds) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            types[i, : len(row)] = torch.tensor(kinds)
            mask[i, : len(row)] = True
        return ids, mask, types

    def _special(self, token: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary lacks {token}")
        return found

    def _row(self, text: str | tuple[str, str], limit: int) -> tuple[list[int], list[int]]:
        parts = [self.encode(part) for part in ((text,) if isinstance(text, str) else text)]
        while sum(map(len, parts)) + len(parts) + 1 > limit:
            longest = max(parts, key=len)
            if not longest:
                raise ValueError(f"limit {limit} leaves no room for a text")
            longest.pop()
        ids, types = [self.cls_id], [0]
        for kind, part in enumerate(parts):
            ids += [*part, self.sep_id]
            types += [kind] * (len(part) + 1)
        return ids, types
