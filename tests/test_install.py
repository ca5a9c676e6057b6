"""The package as a stranger installs it: sdist, wheel and editable, used from another folder and
from the checkout, with and without Hugging Face's package `kernels`.

Dependencies come from the running environment; nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("csrc", "kernels", "llmcore", "scripts", "tests")
FILES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
)
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None

REPORT = """
import pathlib, sys
import llmcore, llmcore.kernels
from llmcore import native
print(pathlib.Path(llmcore.__file__).parent)
print(native.module is not None)
import importlib.util
print(importlib.util.find_spec("llmcore.kernels.rms_norm") is not None)
"""


def run(command: list[str], **options: object) -> str:
    """Its output; the test fails with it when the command does."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def clean_environment(**extra: str) -> dict[str, str]:
    dropped = ("PYTHONPATH", "LLMCORE_BACKEND", "LLMCORE_REQUIRE_NATIVE")
    return {k: v for k, v in os.environ.items() if k not in dropped} | extra


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of a copy of the checkout."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("checkout") / "llmcore"
    copy.mkdir()
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", str(copy)])
    return next((copy / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    """The source tree that the sdist holds: what is missing there is missing for everybody."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.with_name(sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """A wheel built from the sdist."""
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(unpacked)])
    return next((unpacked / "dist").glob("*.whl"))


@pytest.fixture
def python(tmp_path: Path) -> Iterator[str]:
    """The interpreter of a fresh environment with the running one's packages, but not llmcore."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = str(tmp_path / "env" / "bin" / "python")
    own = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    paths = sysconfig.get_paths()
    lines = "\n".join(dict.fromkeys((paths["purelib"], paths["platlib"])))
    (Path(own) / "dependencies.pth").write_text(lines + "\n")
    yield python


def pip(python: str, *arguments: str) -> None:
    run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *arguments],
        env=clean_environment(),
    )


def check(python: str, folder: Path, home: Path) -> None:
    """llmcore, its native and its Triton kernels are found, in `home`, from `folder`."""
    place, has_native, has_kernels = run(
        [python, "-c", REPORT], cwd=folder, env=clean_environment()
    ).split("\n")[:3]
    assert Path(place).is_relative_to(home), place
    assert has_native == str(HAS_COMPILER)
    assert has_kernels == "True"


def test_install_wheel(wheel: Path, python: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "llmcore/kernels/rms_norm.py" in names
    assert "llmcore/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "csrc/", "benchmarks/"))]
    pip(python, str(wheel))
    check(python, tmp_path, tmp_path / "env")


def test_install_editable(unpacked: Path, python: str, tmp_path: Path) -> None:
    pip(python, "--no-build-isolation", "-e", str(unpacked))
    check(python, tmp_path, unpacked)
    check(python, unpacked, unpacked)


def test_install_wheel_beside_a_checkout(wheel: Path, python: str, unpacked: Path) -> None:
    """From a checkout its own sources come first, as ever; the Triton kernels are found."""
    pip(python, str(wheel))
    place, _, has_kernels = run(
        [python, "-c", REPORT], cwd=unpacked, env=clean_environment()
    ).split("\n")[:3]
    assert Path(place).is_relative_to(unpacked)
    assert has_kernels == "True"


@pytest.mark.parametrize("with_kernels", [False, True], ids=["without_kernels", "with_kernels"])
def test_install_transformers_from_the_checkout(with_kernels: bool) -> None:
    """Importing a model of transformers works from the root, where a folder kernels/ is."""
    pytest.importorskip("transformers")
    if with_kernels:
        pytest.importorskip("kernels.layer", reason="Hugging Face's kernels is not installed")
    hide = "" if with_kernels else "import sys; sys.modules['kernels'] = None\n"
    code = hide + "from transformers import LlamaForCausalLM; import llmcore.kernels; print('ok')"
    environment = clean_environment(PYTHONPATH=str(ROOT))
    assert run([sys.executable, "-c", code], cwd=ROOT, env=environment).strip().endswith("ok")


@pytest.fixture
def source(unpacked: Path, tmp_path: Path) -> Path:
    """A source tree in which nothing is built, in a folder whose name has a space."""
    source = tmp_path / "my source"
    ignored = shutil.ignore_patterns("build", "dist", "*.so", "*.egg-info")
    shutil.copytree(unpacked, source, ignore=ignored)
    return source


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_without_kernels(
    source: Path, python: str, tmp_path: Path, editable: bool, compiler: str
) -> None:
    """No compiler, or one that fails: only the definitions run then, and backends() says so."""
    environment = clean_environment(CXX=compiler)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*install, *(["-e"] if editable else []), str(source)], env=environment)
    code = (
        "import torch, llmcore\n"
        "assert llmcore.explain('rms_norm', torch.ones(2, 3)).chosen == 'reference'\n"
        "print(llmcore.ops.rms_norm(torch.ones(2, 3)).sum().item())\n"
        "print(llmcore.backends()['rms_norm']['cpu'])\n"
    )
    total, reason = run([python, "-c", code], cwd=tmp_path, env=environment).splitlines()
    assert abs(float(total) - 6) < 1e-4
    assert "not built" in reason


def test_install_fails_when_kernels_are_required(source: Path, python: str) -> None:
    environment = clean_environment(CXX="false", LLMCORE_REQUIRE_NATIVE="1")
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", str(source)]
    done = subprocess.run(install, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "native kernels are required" in done.stdout + done.stderr


def test_install_one_openmp_runtime() -> None:
    """The process has one libgomp, torch's: two would fight over the cores."""
    code = (
        "import torch, llmcore\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({p for p in maps if 'libgomp' in p or 'libiomp' in p}))\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc on this system")
    assert int(run([sys.executable, "-c", code], env=clean_environment(PYTHONPATH=str(ROOT)))) <= 1


def test_install_no_instruction_leaks(unpacked: Path, wheel: Path) -> None:
    """A level's objects share no inline function with another's: the linker would keep any one."""
    if shutil.which("nm") is None or not HAS_COMPILER:
        pytest.skip("needs a compiler and nm")
    objects = [
        o for o in unpacked.glob("build/native-*/*.o") if o.name.startswith(("portable", "avx"))
    ]
    assert objects
    for path in objects:
        weak = [x for x in run(["nm", str(path)]).splitlines() if x.split()[-2] in ("W", "V", "u")]
        assert not weak, f"{path.name}: {weak}"
