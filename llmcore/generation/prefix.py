"""Beginnings of texts that were read before: a system prompt, or a conversation so far.

Their keys and values are kept in memory, and on disk where wanted, so that only what comes after
them is computed. What a model says is the same, bit for bit, with and without.
"""

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llmcore import device, dispatch
from llmcore.models.cache_base import Kept
from llmcore.models.kv_buffers import Buffers, StoredDtype, check_dtype
from llmcore.models.transformer import Decoder
from llmcore.ops.packed_weight import PackedWeight

FILE_KIND = "llmcore_prefix"
FILE_VERSION = "1"
WHY_REFUSED = {
    "kind": "it is no file of a text's keys and values",
    "version": "it is in another version of the format",
    "model": "it belongs to another model",
    "dtype": "its keys and values are kept in another dtype",
    "kernels": "other kernels computed it, whose last bits are different",
    "tensors": "its numbers are not those that were written",
}


class PrefixCache:
    """Texts that a model has read, with their keys and values, within `max_bytes` of memory.

    The ones used least recently leave. Changing the model's weights empties it.

    dtype  of the caches that it works with (KVCache's option)
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_bytes: int = 1 << 30,
        dtype: StoredDtype | None = None,
    ) -> None:
        check_dtype(dtype)
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}")
        self.model = model
        self.max_bytes = max_bytes
        self.dtype = dtype
        self._texts: OrderedDict[tuple[int, ...], Kept] = OrderedDict()  # the last one used last
        self._weights = weights_version(model)

    def __len__(self) -> int:
        """Texts held."""
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        return sum(kept.buffers.nbytes for kept in self._texts.values())

    def longest(self, ids: Sequence[int]) -> Kept | None:
        """What is held of the longest known beginning of `ids`, as views; None for nothing."""
        self._check_weights()
        new = tuple(ids)
        lengths = {text: common_length(text, new) for text in self._texts}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or lengths[best] == 0:
            return None
        self._texts.move_to_end(best)
        return self._texts[best].head(lengths[best])

    def add(self, ids: Sequence[int], kept: Kept) -> None:
        """Remember what a cache has of a text (`Cache.take`), if there is room; it is copied.

        A text that a window has bitten off is not kept: it can't be continued from its middle.
        """
        self._check_weights()
        text = tuple(ids)
        if len(text) != kept.length:
            raise ValueError(f"ids: {len(text)} tokens, and kept has {kept.length}")
        if kept.first > 0 or not text or kept.buffers.nbytes > self.max_bytes:
            return
        for other in list(self._texts):
            if common_length(other, text) == len(text):
                self._texts.move_to_end(other)
                return
            if common_length(other, text) == len(other):
                del self._texts[other]
        self._texts[text] = kept.copy()
        while self.nbytes > self.max_bytes:
            self._texts.popitem(last=False)

    def save(self, path: str | Path, ids: Sequence[int]) -> None:
        """Write what is held of this text into a file; ValueError unless it is held whole.

        The file appears whole or not at all, also if the process is killed or the machine stops.
        """
        kept = self.longest(ids)
        if kept is None or kept.length < len(ids):
            held = 0 if kept is None else kept.length
            raise ValueError(f"ids: of these {len(ids)} tokens only the first {held} are held")
        tensors = {"ids": torch.tensor(list(ids)), **_named(kept.buffers)}
        metadata = {**self._demands(), "tensors": _digest(tensors)}
        _write_whole(Path(path), safetensors.torch.save(tensors, metadata))

    def load(self, path: str | Path) -> list[int]:
        """Take a text from a file that `save` wrote; returns its token ids.

        ValueError, with the reason, for any other file, one that is damaged, and one of another
        model, dtype or kind of machine.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        data = path.read_bytes()
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        found = _metadata(data)
        for name, expected in {**self._demands(), "tensors": _digest(tensors)}.items():
            if found.get(name) != expected:
                raise ValueError(
                    f"{path}: {WHY_REFUSED[name]} ({name}: {found.get(name)!r}, "
                    f"accepted: {expected!r})"
                )
        ids = tensors.pop("ids").tolist()
        kept = Kept(_unnamed(tensors, self.model.config.layers))
        if kept.buffers.nbytes > self.max_bytes:
            raise ValueError(
                f"{path}: {kept.buffers.nbytes} bytes, more than max_bytes, {self.max_bytes}"
            )
        self.add(ids, kept)
        return ids

    def _demands(self) -> dict[str, str]:
        return {
            "kind": FILE_KIND,
            "version": FILE_VERSION,
            "model": fingerprint(self.model),
            "dtype": str(self.dtype),
            "kernels": dispatch.forced or f"cpu_{device.best_cpu_level()}",
        }

    def _check_weights(self) -> None:
        if (version := weights_version(self.model)) != self._weights:
            self._texts.clear()
            self._weights = version


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginnings on."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def fingerprint(model: Decoder) -> str:
    """A hash over a model's config and all its weights, kept until one of them changes."""
    version = weights_version(model)
    if model not in _fingerprints or _fingerprints[model][0] != version:
        config = json.dumps(asdict(model.config), sort_keys=True)
        digest = _digest(dict(_weights_of(model)), hashlib.blake2b(config.encode(), digest_size=16))
        _fingerprints[model] = (version, digest)
    return _fingerprints[model][1]


_fingerprints: WeakKeyDictionary[Decoder, tuple[Any, str]] = WeakKeyDictionary()


def weights_version(model: Decoder) -> tuple[tuple[int, int], ...]:
    """Another one after each change of the weights, in place or by other tensors."""
    tensors = (tensor for _, tensor in _weights_of(model))
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _weights_of(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()
    for name, module in model.named_modules():
        for key, weight in vars(module).items():
            if isinstance(weight, PackedWeight):
                for part in ("values", "scales", "minimums"):
                    if (tensor := getattr(weight, part)) is not None:
                        yield f"{name}.{key}.{part}", tensor


def _digest(tensors: Mapping[str, Tensor], start: Any = None) -> str:
    """A hash over names, dtypes, shapes and numbers, after what `start` has taken in."""
    digest = start or hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(buffers: Buffers) -> dict[str, Tensor]:
    return {
        f"{kind}.{layer}": tensor.contiguous()
        for kind, tensors in vars(buffers).items()
        for layer, tensor in enumerate(tensors)
    }


def _unnamed(tensors: Mapping[str, Tensor], layers: int) -> Buffers:
    """The way back."""
    kinds = {name.partition(".")[0] for name in tensors}
    return Buffers(**{kind: [tensors[f"{kind}.{i}"] for i in range(layers)] for kind in kinds})


def _metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file says of itself."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _write_whole(path: Path, data: bytes) -> None:
    """A file, readable by its owner, that is there with all its data or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
