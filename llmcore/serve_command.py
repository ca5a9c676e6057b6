"""`llmcore serve`: an OpenAI-compatible server, transformers' own, for a model on llmcore.

The server is `transformers serve` as it is; what this adds is a model that it takes (SmolLM2, a
.gguf file or llmcore's own folder are written in Hugging Face's form first) and, once the server
has loaded it and before it listens, `llmcore.accelerate`. docs/serve.md has what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmcore.accelerate import accelerate
from llmcore.model_arguments import add_model, add_weights, load_model
from llmcore.models.convert import to_transformers
from llmcore.models.files import CONFIG_FILE, KINDS
from llmcore.models.packed import check_format

INSTALL = "install it with: pip install 'llmcore[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_weights(parser)
    parser.add_argument("--host", default="localhost", help="to listen at (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, help="to listen at (default: 8000)")


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted; 1 when the server or the model can't be had."""
    try:
        check_format(args.weights)
        server = server_class(args.weights)
        with folder_of(args) as name:
            server(force_model=name, device="cpu", host=args.host, port=args.port)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"llmcore serve: {error}", file=sys.stderr)
        return 1
    return 0


def server_class(weights: str | None) -> Any:
    """transformers' server, which accelerates its model before it listens.

    ImportError where its parts are not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is here: nobody need be asked
    try:
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ImportError(f"{error}; {INSTALL}") from error
    if not is_serve_available():
        raise ImportError(f"transformers' server lacks a package; {INSTALL}")

    class Server(Serve):
        def __init__(self, *, host: str, port: int, **options: Any) -> None:
            self.address = f"http://{host}:{port}/v1"
            # Told not to block, it calls start_server once all is ready, and returns.
            super().__init__(**options, host=host, port=port, non_blocking=True)

        def start_server(self) -> None:
            manager: Any = self._model_manager
            names = [name.rpartition("@")[0] for name in manager.loaded_models]
            for name, loaded in zip(names, manager.loaded_models.values(), strict=True):
                print(f"{name} at {self.address}", flush=True)
                print(accelerate(loaded.model, weights=weights), flush=True)
            # Its own list is what the download cache holds, and an error where there is none.
            listed = [
                {"id": name, "object": "model", "owned_by": "", "created": 0} for name in names
            ]
            manager.get_gen_models = lambda: listed
            self._thread = None
            try:
                self.server.run()
            finally:  # it passes on the signal that ended it
                self.kill_server()

    return Server


@contextlib.contextmanager
def folder_of(args: argparse.Namespace) -> Iterator[str]:
    """The model as a folder in Hugging Face's form, by the name that requests call it by.

    Another form than that is written to a temporary folder, and the current folder is then the one
    around it: so the model is called what it was asked for as, and not by a path nobody knows.
    """
    if is_hugging_face(Path(args.model)):
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        yield args.model
        return
    model, tokenizer = load_model(args)
    name, here = Path(args.model).stem, Path.cwd()
    with tempfile.TemporaryDirectory(prefix="llmcore-serve-") as folder:
        to_transformers(model).save_pretrained(Path(folder) / name)
        tokenizer.save(Path(folder) / name)
        del model
        os.chdir(folder)
        try:
            yield name
        finally:
            os.chdir(here)


def is_hugging_face(folder: Path) -> bool:
    """Whether transformers loads this folder; its own errors are better than ours then."""
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind not in KINDS
