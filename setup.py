"""Builds llmcore's native kernels with ninja: each op once per instruction-set level, one library.

Without a compiler the package installs all the same: the plain-PyTorch definitions run and
`llmcore.backends()` says why.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# The names and their order are csrc/ops.h's LLMCORE_LEVELS.
LEVELS: dict[str, list[str]] = {"portable": []} | (
    {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    }
    if X86
    else {}
)

# Errors where we build; elsewhere a newer compiler's new warning must not break an install.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
if os.environ.get("LLMCORE_WERROR") == "1":
    WARNINGS.append("-Werror")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
# No -ffast-math: NaN and inf go through as in torch. No contraction: vec.h says where an FMA is.
# GCC's own AVX-512 headers set off the warnings on uninitialized values.
KERNEL = [
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; sources and flags are the functions above."""

    def build_extension(self, ext: Extension) -> None:
        if shutil.which(self.compiler_name()) is None:
            self.warn(
                f"no C++ compiler ({self.compiler_name()}): llmcore installs without native kernels"
            )
            return
        import torch

        # Not build_temp, which pip makes anew each time: a second build compiles what changed.
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(target, Path(torch.__file__).parent))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([*ninja_command(), "-C", str(folder), "-j", jobs], check=True)

    @staticmethod
    def compiler_name() -> str:
        return os.environ.get("CXX", "g++")

    def ninja_file(self, target: Path, torch_folder: Path) -> str:
        import pybind11

        # Plain include paths for ours, -isystem for theirs: warnings are errors in csrc only.
        binding = [
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-isystem {torch_folder / 'include'}",
            f"-isystem {pybind11.get_include()}",
            f"-isystem {sysconfig.get_paths()['include']}",
        ]
        lines = [
            f"cxx = {self.compiler_name()}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  description = $out",
            "rule link",
            f"  command = $cxx -shared -o $out $in -L{torch_folder / 'lib'} -ltorch_cpu",
            "  description = $out",
        ]
        objects = []

        def compile_to(name: str, source: Path, flags: list[str]) -> None:
            lines.append(
                f"build {name}.o: compile {source}\n  flags = {' '.join([*COMMON, *flags])}"
            )
            objects.append(f"{name}.o")

        csrc = ROOT / "csrc"
        compile_to("levels", csrc / "levels.cpp", [])
        compile_to("module", csrc / "module.cpp", binding)
        for source in sorted((csrc / "register").glob("*.cpp")):
            compile_to(f"register_{source.stem}", source, binding)
        for level, flags in LEVELS.items():
            for source in kernel_sources():
                defines = [f"-DLLMCORE_LEVEL={level}"]
                compile_to(f"{level}_{source.stem}", source, [*KERNEL, *flags, *defines])
        lines.append(f"build {target}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    found = shutil.which("ninja")
    return [found] if found else [sys.executable, "-m", "ninja"]


# Top-level folders whose modules a wheel holds in the package of that name.
TOP_LEVEL = {"llmcore.kernels": "kernels", "llmcore.benchmarks": "benchmarks"}


class PackageWithTopLevelFolders(build_py):
    """Puts the modules of the top-level folders into their packages."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        folder = TOP_LEVEL.get(package)
        if folder is not None:
            found = sorted((ROOT / folder).glob("*.py"))
            modules += [(package, source.stem, str(source.relative_to(ROOT))) for source in found]
        return modules


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["llmcore", "llmcore.*"]),
        package_data={"llmcore": ["py.typed"]},
        ext_modules=[Extension("llmcore._native", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "build_py": PackageWithTopLevelFolders},
    )
