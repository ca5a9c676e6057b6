"""Reading a .gguf file: its fields, its weights as float32, its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.text.tokenizer import Tokenizer

# llama.cpp's numbers for the kinds of tokens.
NORMAL, CONTROL = 1, 3


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All fields, and all tensors dequantised to float32.

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
    return fields, tensors


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
