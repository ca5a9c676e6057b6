"""Where files are kept, and how they come to be: whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """$LLMCORE_CACHE, or .cache/llmcore in the home folder."""
    return Path(os.environ.get("LLMCORE_CACHE") or Path.home() / ".cache" / "llmcore")


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A place beside `target` to write a file or a folder to, which then becomes `target`.

    It is on the disk before it gets its name. What stood there before is replaced if it is a file,
    or an empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as folder:
        part = Path(folder) / target.name
        yield part
        for path in (part, *part.rglob("*")):
            _flush(path)
        os.replace(part, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
