"""Text to token ids and back, byte for byte.

A byte-level BPE (GPT-2's scheme: a token is a string of bytes, so that any text can be written)
held by the `tokenizers` library. Two things are ours:

- special tokens. `encode` reads text as text: a user who types `<|im_end|>` gets the tokens of
  those ten characters. Only `allow_special=True` makes the control token of it.
- bytes. Ids are turned into bytes here, so that a stream can be cut anywhere and its pieces still
  join to the whole text.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers
from torch import Tensor

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_LETTER_OF = {byte: letter for letter, byte in _BYTE_OF.items()}


class Tokenizer:
    """A vocabulary with its merges, special tokens, chat template, and end and padding tokens.

    `bos`, `eos` and `pad` are the tokens' texts or None. Nothing is ever added to what is encoded:
    who wants a begin-of-text token puts it there.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """ValueError when `inner` isn't a byte-level BPE, or a named token isn't in it."""
        byte_level = isinstance(inner.decoder, decoders.ByteLevel)
        if not (byte_level and isinstance(inner.model, tokenizers.models.BPE)):
            raise ValueError(
                f"a byte-level BPE tokenizer is accepted, got model {type(inner.model).__name__} "
                f"with decoder {type(inner.decoder).__name__}"
            )
        self._inner = inner
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # as the text it is: see encode
        self.bos, self.eos, self.pad = bos, eos, pad
        self.chat_template = chat_template
        self.special: dict[str, int] = {}
        self._added: dict[int, bytes] = {}
        self._read_added_tokens()
        for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
            if token is not None and inner.token_to_id(token) is None:
                raise ValueError(f"the {name} token {token!r} isn't in the vocabulary")
        vocabulary = inner.get_vocab()
        self._size = max(vocabulary.values()) + 1
        self._missing = bytes(b for letter, b in _BYTE_OF.items() if letter not in vocabulary)

    @classmethod
    def from_bpe(
        cls,
        tokens: Sequence[str],
        merges: Sequence[str],
        special: Iterable[str],
        **settings: str | None,
    ) -> "Tokenizer":
        """SmolLM's scheme: digits one by one, then GPT-2's words, with no space put in front.

        tokens in the order of their ids, merges as "left right" best first, special among tokens.
        """
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            raise ValueError(f"{len(tokens) - len(vocabulary)} tokens appear twice")
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )  # fmt: skip
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(list(special))
        return cls(inner, **settings)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """tokenizer.json, with tokenizer_config.json and chat_template.jinja where they are."""
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {TOKENIZER_FILE}")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        settings: dict[str, str | None] = {}
        if (folder / SETTINGS_FILE).is_file():
            settings = _read_settings(folder / SETTINGS_FILE)
        if (folder / TEMPLATE_FILE).is_file():
            settings["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        return cls(inner, **settings)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing folder."""
        folder = Path(folder)
        self._inner.save(str(folder / TOKENIZER_FILE))
        settings = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "chat_template": self.chat_template,
        }
        text = json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Rows a model's vocabulary needs for these tokens."""
        return self._size

    @property
    def eos_id(self) -> int | None:
        return None if self.eos is None else self._inner.token_to_id(self.eos)

    @property
    def pad_id(self) -> int | None:
        """The padding token's id; the end token's where there is none."""
        return self.eos_id if self.pad is None else self._inner.token_to_id(self.pad)

    def add_special(self, *tokens: str) -> list[int]:
        """Make these texts special tokens, new at the end unless they exist; returns their ids."""
        if not all(tokens):
            raise ValueError("a special token can't be empty")
        self._inner.add_special_tokens(list(tokens))
        self._read_added_tokens()
        self._size = max(self._size, *(self.special[token] + 1 for token in tokens))
        return [self.special[token] for token in tokens]

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """The ids of a text, or of bytes of any kind.

        ValueError when the vocabulary lacks a byte of it (SmolLM2's lacks some control characters,
        which other libraries drop in silence), UnicodeEncodeError on half a surrogate pair.
        """
        if isinstance(text, bytes):
            return self._encode_bytes(text)
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in self.split_special(text):
            ids += [part] if isinstance(part, int) else self._encode_plain(part)
        return ids

    def split_special(self, text: str) -> list[int | str]:
        """The text cut at its special tokens: their ids, and what stands between as text."""
        parts: list[int | str] = []
        if not self.special:
            return [text] if text else []
        for i, part in enumerate(self._special_pattern.split(text)):
            if i % 2:
                parts.append(self.special[part])
            elif part:
                parts.append(part)
        return parts

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; ValueError for an id that stands for nothing."""
        return b"".join(self._bytes_of(int(token)) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """As text; bytes that aren't UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def batch(
        self, texts: Sequence[str], *, side: str = "left", allow_special: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Several texts as one padded batch: ids (B, T) int64, attention_mask (B, T) bool.

        side  where the padding goes: "left" (to generate) or "right"
        """
        if side not in ("left", "right"):
            raise ValueError(f'side must be "left" or "right", got {side!r}')
        if not texts:
            raise ValueError("a batch needs at least one text")
        rows = [self.encode(text, allow_special=allow_special) for text in texts]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id or 0)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.int64)
            mask[i, place] = True
        return ids, mask

    def _read_added_tokens(self) -> None:
        # What the chat template writes is control, even where the file doesn't mark it special.
        template = self.chat_template or ""
        added = self._inner.get_added_tokens_decoder()
        unmarked = [
            token.content
            for token in added.values()
            if not token.special and token.content.strip() and token.content in template
        ]
        if unmarked:
            self._inner.add_special_tokens(unmarked)
            added = self._inner.get_added_tokens_decoder()
        self._added = {i: token.content.encode() for i, token in added.items()}
        self.special = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _encode_plain(self, text: str) -> list[int]:
        data = text.encode()
        if len(data.translate(None, self._missing)) < len(data):
            lost = next(c for c in text if set(c.encode()) & set(self._missing))
            raise ValueError(f"the vocabulary has no token for U+{ord(lost):04X}")
        return self._inner.encode(text, add_special_tokens=False).ids

    def _encode_bytes(self, data: bytes) -> list[int]:
        ids: list[int] = []
        # surrogateescape makes one of the characters split at of each byte that isn't UTF-8.
        text = data.decode("utf-8", "surrogateescape")
        for i, part in enumerate(re.split("([\udc80-\udcff])", text)):
            if i % 2 == 0:
                ids += self._encode_plain(part)
                continue
            byte = ord(part) - 0xDC00
            token = self._inner.token_to_id(_LETTER_OF[byte])
            if token is None:
                raise ValueError(f"the vocabulary has no token for the byte 0x{byte:02X}")
            ids.append(token)
        return ids

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._inner.id_to_token(token) if token >= 0 else None
        if text is None:
            raise ValueError(f"token {token} isn't in the vocabulary of {len(self)}")
        return bytes(_BYTE_OF[letter] for letter in text)


class TextStream:
    """Ids in, text out as soon as its characters are whole; the pieces join to `decode`'s text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes: may be empty, never half a character."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left at the end: U+FFFD where the ids stopped inside a character."""
        return self._utf8.decode(b"", final=True)


def _read_settings(path: Path) -> dict[str, str | None]:
    """The settings we use out of a tokenizer_config.json, ours or Hugging Face's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings: dict[str, str | None] = {}
        for name in ("bos", "eos", "pad"):
            token = found.get(f"{name}_token")
            if token is not None:
                settings[name] = token if isinstance(token, str) else token["content"]
        template = found.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if template is not None:
            settings["chat_template"] = template
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer configuration: {error!r}") from error
    return settings
