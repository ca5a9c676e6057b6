"""Which of an op's two GPU kernels, CUDA C++ or Triton, gets a call first: what was measured.

A table in a file, written by `llmcore bench --device cuda --table`: for each GPU by name, op and
class of shapes, the seconds of both. Where it has nothing, the contract's order holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmcore import storage

BACKENDS = ("cuda", "triton")


class Measured(NamedTuple):
    """Seconds of both kernels on a GPU, geometric means over the cases of a class of shapes."""

    gpu: str
    shapes: str
    cuda: float
    triton: float

    @property
    def fastest(self) -> str:
        return "cuda" if self.cuda <= self.triton else "triton"

    def __str__(self) -> str:
        times = f"cuda {self.cuda * 1e6:.1f} us, triton {self.triton * 1e6:.1f} us"
        return f"measured on {self.gpu} ({self.shapes}): {times}"


Table = dict[str, dict[str, dict[str, dict[str, float]]]]
"""GPU -> op -> class of shapes -> backend -> seconds."""

_read: dict[Path, Table] = {}


def path() -> Path:
    """$LLMCORE_GPU_TABLE, or gpu_table.json in the cache folder."""
    given = os.environ.get("LLMCORE_GPU_TABLE")
    return Path(given) if given else storage.cache_folder() / "gpu_table.json"


def table() -> Table:
    """The file's table, read once; empty where there is none.

    Raises:
        ValueError: the file is not such a table.
    """
    file = path()
    if file not in _read:
        try:
            _read[file] = checked(json.loads(file.read_text()))
        except FileNotFoundError:
            _read[file] = {}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}: not a table of GPU kernels ({error}); delete it, or write it anew with "
                "llmcore bench --device cuda --table"
            ) from error
    return _read[file]


def checked(found: Any) -> Table:
    """The same, its numbers known to be there."""
    return {
        gpu: {
            op: {c: {b: float(seconds[b]) for b in BACKENDS} for c, seconds in classes.items()}
            for op, classes in ops.items()
        }
        for gpu, ops in found.items()
    }


def measured(gpu: str, op: str, shapes: str) -> Measured | None:
    """What the table has of a class of an op's shapes on a GPU."""
    found = table().get(gpu, {}).get(op, {}).get(shapes)
    return Measured(gpu, shapes, found["cuda"], found["triton"]) if found else None


def write(gpu: str, times: Iterable[tuple[str, str, Mapping[str, float]]]) -> Path:
    """Puts (op, class of shapes, seconds by backend) of cases into the file, and returns its path.

    The classes that were measured are replaced, all else stays. A case without both backends says
    nothing about which is the faster one, and is left out.
    """
    logs: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for op, shapes, seconds in times:
        if all(backend in seconds for backend in BACKENDS):
            logs.setdefault((op, shapes), []).append(tuple(math.log(seconds[b]) for b in BACKENDS))
    found = {name: dict(ops) for name, ops in table().items()}
    ops = found.setdefault(gpu, {})
    for (op, shapes), cases in logs.items():
        means = [math.exp(sum(column) / len(cases)) for column in zip(*cases, strict=True)]
        ops[op] = {**ops.get(op, {}), shapes: dict(zip(BACKENDS, means, strict=True))}
    file = path()
    with storage.whole(file) as part:
        part.write_text(json.dumps(found, indent=1, sort_keys=True))
    _read.pop(file, None)
    return file


def rows_class(x: torch.Tensor, *rest: Any) -> str:
    """Of a row-wise op's first tensor: its dtype, few or many rows, and how wide they are."""
    width = x.shape[-1] if x.ndim else 1
    rows = "few rows" if x.numel() < 1024 * width else "many rows"
    widest = next((limit for limit in (1024, 8192) if width <= limit), None)
    wide = f"width to {widest}" if widest else "width above 8192"
    return f"{str(x.dtype).removeprefix('torch.')}, {rows}, {wide}"


def attention_class(q: torch.Tensor, *rest: Any) -> str:
    """Of attention's q (B, H, T, D): its dtype, decoding or a prompt, and the head's width."""
    kind = "decoding" if q.shape[2] <= 8 else "prompt"
    return f"{str(q.dtype).removeprefix('torch.')}, {kind}, D {q.shape[3]}"
