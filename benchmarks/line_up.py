"""Who takes part in `llmcore bench generate`, and what they need on disk.

Everybody makes its engine in a process of its own (engine_process.py), from the shape's name: so
what makes one is a function that can be pickled.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcore.models import Decoder, TransformerConfig
from llmcore.models.convert import to_transformers
from llmcore.models.files import load
from llmcore.models.packed import pack_weights
from llmcore.storage import cache_folder, whole

from . import other_engines
from .engine_process import reason
from .engines import HUGGING_FACE, LLAMA_CPP, OTHERS, OURS, WIDTHS, Engine, HuggingFace, Llmcore

SMOLLM2, HALF_BILLION = "smollm2", "0.5b"
SHAPES = (SMOLLM2, HALF_BILLION)
"""What can be run: SmolLM2-135M, or a random Llama of half a billion weights."""

HALF_BILLION_CONFIG = TransformerConfig(
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    feed_forward=4864,
    context_length=2048,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Someone who may take part; `make` fails where a library is missing."""

    name: str
    side: str
    width: str
    make: Callable[[], Engine]


def model_of(shape: str) -> tuple[Decoder, Any]:
    """The model in float32, and its tokenizer if it has one."""
    if shape == SMOLLM2:
        return load("smollm2")
    torch.manual_seed(0)
    return Decoder(HALF_BILLION_CONFIG).eval(), None


@contextlib.contextmanager
def place_for(shape: str) -> Iterator[Path]:
    """Where peers' files go: SmolLM2's are kept, those of random weights are not."""
    if shape == SMOLLM2:
        yield cache_folder() / "bench-smollm2"
        return
    with tempfile.TemporaryDirectory(prefix="llmcore-bench-") as folder:
        yield Path(folder)


def stock_folder(model: Decoder, tokenizer: Any, folder: Path) -> Path | None:
    """The model as a Hugging Face folder with its tokenizer; None where that cannot be."""
    if tokenizer is None:
        return None
    path = folder / "transformers"
    with contextlib.suppress(ImportError):
        if not path.exists():
            with whole(path) as part:
                to_transformers(model).save_pretrained(part)
                tokenizer.save(part)
    return path if path.exists() else None


def make_ours(shape: str, width: str) -> Engine:
    model, _ = model_of(shape)
    if width != "fp32":
        pack_weights(model, width)
    return Llmcore(model, width)


def make_hugging_face(shape: str, width: str, compiled: bool) -> Engine:
    stock = to_transformers(model_of(shape)[0]).to(DTYPES[width])
    return HuggingFace(stock, width, compiled=compiled)


def make_llama_cpp(shape: str, folder: Path, format: str) -> Engine:
    return other_engines.LlamaCpp(lambda: model_of(shape)[0], folder, format)


def ours_in(shape: str) -> list[Entry]:
    """The model in every width."""
    return [
        Entry(f"{OURS} {width}", OURS, width, partial(make_ours, shape, width)) for width in WIDTHS
    ]


def peers_of(shape: str, folder: Path, stock_folder: Path | None, compiles: bool) -> list[Entry]:
    """All peers; some convert a folder with a tokenizer, where there is one."""
    found = [
        Entry(f"HF eager {w}", HUGGING_FACE, w, partial(make_hugging_face, shape, w, False))
        for w in DTYPES
    ]
    if compiles:
        make = partial(make_hugging_face, shape, "fp32", True)
        found.append(Entry("HF compiled, static cache fp32", HUGGING_FACE, "fp32", make))
    for format, width in other_engines.GGUF_WIDTHS.items():
        llama = partial(make_llama_cpp, shape, folder, format)
        found.append(Entry(f"llama.cpp {format}", LLAMA_CPP, width, llama))
    if stock_folder is not None:
        for format, width in other_engines.CTRANSLATE2_WIDTHS.items():
            translate = partial(other_engines.CTranslate2, stock_folder, folder, format)
            found.append(Entry(f"CTranslate2 {format}", OTHERS, width, translate))
        for format, width in other_engines.GENAI_WIDTHS.items():
            onnx = partial(other_engines.OnnxRuntimeGenAI, stock_folder, folder, format)
            found.append(Entry(f"onnxruntime-genai {format}", OTHERS, width, onnx))
    return found


def line_up(
    entries: list[Entry], host: Callable[[Callable[[], Engine]], Engine]
) -> tuple[list[Engine], dict[str, str]]:
    """Who could be made, one after the other, and why the others could not; ours must be."""
    made, missing = [], dict(other_engines.ABSENT)
    for entry in entries:
        try:
            made.append(host(entry.make))
        except Exception as error:  # the run says it and goes on
            if entry.side == OURS:
                raise
            missing[entry.name] = reason(error)
    return made, missing
