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
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import setup_script
from package_build import Package, environment

ROOT = Path(__file__).resolve().parents[1]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None

REPORT = """
import importlib.util, pathlib
import llmcore, llmcore.kernels
from llmcore import device
print(pathlib.Path(llmcore.__file__).parent)
print(*device.cpu_levels())
print(importlib.util.find_spec("llmcore.kernels.rms_norm") is not None)
"""


def run(command: list[str], **options: object) -> str:
    """Its output; the test fails with it when the command does."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def unpacked(package: Package) -> Path:
    """The source tree that the sdist holds."""
    return package.unpacked


@pytest.fixture
def wheel(package: Package) -> Path:
    """A wheel built from the sdist."""
    return package.wheel


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
        env=environment(),
    )


def check(python: str, folder: Path, home: Path) -> None:
    """llmcore, its native and its Triton kernels are found, in `home`, from `folder`."""
    place, levels, has_kernels = run([python, "-c", REPORT], cwd=folder, env=environment()).split(
        "\n"
    )[:3]
    assert Path(place).is_relative_to(home), place
    assert levels == ("portable" if HAS_COMPILER else "")
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
    place, _, has_kernels = run([python, "-c", REPORT], cwd=unpacked, env=environment()).split(
        "\n"
    )[:3]
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
    there = environment(PYTHONPATH=str(ROOT))
    assert run([sys.executable, "-c", code], cwd=ROOT, env=there).strip().endswith("ok")


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
    broken = environment(CXX=compiler)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*install, *(["-e"] if editable else []), str(source)], env=broken)
    code = (
        "import torch, llmcore\n"
        "assert llmcore.explain('rms_norm', torch.ones(2, 3)).chosen == 'reference'\n"
        "print(llmcore.ops.rms_norm(torch.ones(2, 3)).sum().item())\n"
        "print(llmcore.backends()['rms_norm']['cpu'])\n"
    )
    total, reason = run([python, "-c", code], cwd=tmp_path, env=broken).splitlines()
    assert abs(float(total) - 6) < 1e-4
    assert "not built" in reason


def test_install_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLMCORE_LEVELS: all without it, portable with any, nothing for a name that there is not."""
    setup = setup_script.load()
    monkeypatch.delenv("LLMCORE_LEVELS", raising=False)
    assert setup.chosen_levels() == setup.LEVELS
    best = [*setup.LEVELS][-1]
    monkeypatch.setenv("LLMCORE_LEVELS", best)
    assert list(setup.chosen_levels()) == list(dict.fromkeys(["portable", best]))
    monkeypatch.setenv("LLMCORE_LEVELS", f"{best},avx1024")
    with pytest.raises(SystemExit, match="avx1024 is none of portable"):
        setup.chosen_levels()


def test_install_fails_when_kernels_are_required(source: Path, python: str) -> None:
    broken = environment(CXX="false", LLMCORE_REQUIRE_NATIVE="1")
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", str(source)]
    done = subprocess.run(install, capture_output=True, text=True, env=broken)
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
    assert int(run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT)))) <= 1
