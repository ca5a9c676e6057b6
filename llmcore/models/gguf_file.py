"""Reading a .gguf file: its fields, its weights as float32 or as they are, its tokenizer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcore.ops.packed_weight import Integers, PackedWeight, from_integers
from llmcore.text.tokenizer import Tokenizer

# What a PackedWeight holds without loss.
KINDS = ("Q8_0", "Q4_0", "Q4_1")

# llama.cpp's numbers for the kinds of tokens.
NORMAL, CONTROL = 1, 3


class Contents(NamedTuple):
    """What a file holds: all fields, all tensors dequantised to float32, and as they are."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: list[Any]  # gguf.ReaderTensor


def read(path: Path) -> Contents:
    """A file's contents.

    ValueError for a file that isn't GGUF, is cut off, or holds another architecture than llama.
    """
    import gguf

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} begins with {magic!r}; a GGUF file begins with b'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")  # the header, whose contents have no type
        }
    except Exception as error:  # any kind: the reader meets a cut-off file as numpy, index or type
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} has the architecture {architecture!r}; accepted is 'llama'")
    tensors = {
        # A copy: what is float32 already comes as a view of the file.
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return Contents(fields, tensors, reader.tensors)


def integers(stored: Iterable[Any]) -> dict[str, Integers]:
    """The matrices of Q8_0, Q4_0 and Q4_1 among `Contents.stored`, without loss."""
    return {
        tensor.name: _integers(tensor.data, tensor.tensor_type.name)
        for tensor in stored
        if tensor.tensor_type.name in KINDS and tensor.data.ndim == 2
    }


def packed_weight(data: Any, kind: Any) -> PackedWeight:
    """A matrix of Q8_0, Q4_0 or Q4_1 as a PackedWeight, without loss.

    data  (N, bytes of a row) uint8, the file's own, as gguf.ReaderTensor.data
    kind  its gguf.GGMLQuantizationType; ValueError for another, for rows that are no whole blocks,
          and for a scale or minimum that is not finite
    """
    if kind.name not in KINDS:
        raise ValueError(f"kind: got {kind.name}, expected one of {', '.join(KINDS)}")
    return from_integers(*_integers(data, kind.name))


def _integers(data: Any, kind: str) -> Integers:
    """A block is a float16 scale, in Q4_1 a float16 minimum, and 32 integers: bytes, or 16 bytes
    whose low halves are the first 16."""
    head = 4 if kind == "Q4_1" else 2
    bytes_of_block = head + (32 if kind == "Q8_0" else 16)
    if data.ndim != 2 or data.shape[1] % bytes_of_block:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected (N, a multiple of {bytes_of_block}), "
            f"the bytes of a block of {kind}"
        )
    blocks = torch.tensor(data).unflatten(1, (-1, bytes_of_block))
    halves, packed = blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:]
    scales = halves[..., 0]
    if kind == "Q8_0":
        q = packed.contiguous().view(torch.int8).to(torch.int16)
        return Integers("int8", q.flatten(1), scales)
    q = torch.cat((packed & 15, packed >> 4), -1).to(torch.int16).flatten(1)
    if kind == "Q4_0":
        return Integers("int4", q - 8, scales)
    return Integers("int4", q, scales, halves[..., 1])


def tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the fields; ValueError for another kind than SmolLM's."""
    for name, accepted in (("model", "gpt2"), ("pre", "smollm")):
        value = fields.get(f"tokenizer.ggml.{name}")
        if value != accepted:
            raise ValueError(f"tokenizer.ggml.{name} is {value!r}: accepted is {accepted!r}")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if set(kinds) - {NORMAL, CONTROL} or len(kinds) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(kinds)} entries of kinds {sorted(set(kinds))}: "
            f"accepted are {len(tokens)} of the kinds {NORMAL} and {CONTROL}"
        )
    named = {
        ours: tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    return Tokenizer.from_bpe(
        tokens,
        fields["tokenizer.ggml.merges"],
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
        chat_template=fields.get("tokenizer.chat_template"),
        **named,
    )
