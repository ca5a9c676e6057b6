"""Builds llmcore's native kernels with ninja: each op once per instruction-set level, one library.

Without a compiler, or where it fails, the package installs all the same: the plain-PyTorch
definitions run and `llmcore.backends()` says so. With LLMCORE_REQUIRE_NATIVE=1 either is an error.
"""

import collections
import os
import platform
import re
import shlex
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
        # Every CPU with the former has the latter.
        "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    }
    if X86
    else {}
)


def chosen_levels() -> dict[str, list[str]]:
    """Those of LEVELS that LLMCORE_LEVELS names ("avx2 avx512"; without it all), and portable.

    What is built for machines that one knows takes a part of the time.
    """
    names = os.environ.get("LLMCORE_LEVELS", " ".join(LEVELS)).replace(",", " ").split()
    if unknown := [name for name in names if name not in LEVELS]:
        raise SystemExit(f"LLMCORE_LEVELS: {', '.join(unknown)} is none of {', '.join(LEVELS)}")
    return {level: flags for level, flags in LEVELS.items() if level in ("portable", *names)}


# Errors where we build; elsewhere a newer compiler's new warning must not break an install.
# Clang would warn of warnings that only GCC knows.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-warning-option", "-Wno-psabi"]
if os.environ.get("LLMCORE_WERROR") == "1":
    WARNINGS.append("-Werror")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
# No -ffast-math: NaN and inf go through as in torch. No contraction: vec.h says where an FMA is.
# GCC's own AVX-512 headers set off the warnings on uninitialized values.
KERNEL = [
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]


# Machine code for A100, H100 and B200, and PTX for what comes after them.
CUDA_TARGETS = ("80", "90", "100")
NVCC = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
if os.environ.get("LLMCORE_WERROR") == "1":
    NVCC += ["-Werror", "all-warnings"]


def nvcc_flags(source: Path) -> list[str]:
    """For all targets; a source whose name ends in _sm90 has instructions of sm_90a alone."""
    own = re.search(r"_sm(\d+)$", source.stem)
    if own is not None:
        return [*NVCC, f"-gencode=arch=compute_{own.group(1)}a,code=sm_{own.group(1)}a"]
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
    newest = CUDA_TARGETS[-1]
    return [*NVCC, *targets, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_reason(torch_has_cuda: bool) -> str:
    """Why the CUDA kernels are not built ("": they are). LLMCORE_CUDA=0 leaves them out."""
    if os.environ.get("LLMCORE_CUDA") == "0":
        return "not built: LLMCORE_CUDA=0 left the CUDA kernels out"
    if not torch_has_cuda:
        return "not built: torch was a CPU build at the installation"
    if shutil.which("nvcc") is None:
        return "not built: there was no nvcc at the installation"
    return ""


def cuda_toolkit() -> Path:
    """The folder of nvcc's toolkit, as it says itself: what is on PATH may be a script."""
    command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    if top is None:
        raise NativeBuildError("nvcc does not say where its toolkit is (nvcc --dryrun has no TOP)")
    return Path(top.group(1).strip()).resolve()


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def compiler() -> list[str]:
    """The words of CXX, which may hold a launcher or options ("ccache g++ -m64"), else g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def words(*arguments: str | Path) -> str:
    """Arguments of a command, quoted for the shell and then for a value in build.ninja."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path in a build line of build.ninja. (In commands ninja quotes it for the shell itself.)"""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NativeBuildError(Exception):
    """The native kernels can't be built; the message says why."""


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; sources and flags are the functions above."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_native(target)
        except NativeBuildError as error:
            target.unlink(missing_ok=True)  # an older build's kernels are not of these sources
            if self.editable_mode:
                (ROOT / "llmcore" / target.name).unlink(missing_ok=True)
            if os.environ.get("LLMCORE_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"llmcore's native kernels are required: {error}") from error
            line = "*" * 80
            self.warn(
                f"\n{line}\nllmcore installs WITHOUT its native kernels, the plain-PyTorch "
                f"definitions only:\n{error}\n"
                f"(LLMCORE_REQUIRE_NATIVE=1 makes an error of this.)\n{line}"
            )

    def build_native(self, target: Path) -> None:
        """Compiles and links `target`, or raises NativeBuildError with the last of the output."""
        if shutil.which(compiler()[0]) is None:
            raise NativeBuildError(f"no C++ compiler: {compiler()[0]} is not there")
        # Not build_temp, which pip makes anew each time: a second build compiles what changed.
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            import torch

            folder.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            torch_folder = Path(torch.__file__).parent
            reason = cuda_reason(torch.backends.cuda.is_built())
            print(f"CUDA kernels: {reason or 'built for sm_' + ', '.join(CUDA_TARGETS)}")
            (folder / "build.ninja").write_text(self.ninja_file(target, torch_folder, reason))
            command = [*ninja_command(), "-C", str(folder), "-j", jobs]
            status, output = run_and_show(command)
        except (ImportError, OSError) as error:
            raise NativeBuildError(f"{type(error).__name__}: {error}") from error
        if status != 0:
            raise NativeBuildError(f"the build failed; its last lines:\n{output}")

    def ninja_file(self, target: Path, torch_folder: Path, without_cuda: str) -> str:
        import pybind11

        # Plain include paths for ours, -isystem for theirs: warnings are errors in csrc only.
        binding = [
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *("-isystem", str(torch_folder / "include")),
            *("-isystem", pybind11.get_include()),
            *("-isystem", sysconfig.get_paths()["include"]),
        ]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        if not without_cuda:
            binding += ["-DLLMCORE_CUDA", "-DUSE_CUDA"]
            toolkit = cuda_toolkit()
            # The runtime is linked in: the driver is what must fit, not torch's own runtime.
            libraries += ["-ltorch_cuda", f"-L{toolkit / 'lib64'}", "-lcudart_static"]
            libraries += ["-ldl", "-lrt", "-lpthread"]
        reason = [f'-DLLMCORE_CUDA_REASON="{without_cuda}"']
        if sys.platform == "darwin":  # its linker wants to be told that Python comes later
            libraries += ["-undefined", "dynamic_lookup"]
        lines = [
            f"cxx = {words(*compiler())}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  description = $out",
            "rule nvcc",
            "  command = nvcc -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  description = $out",
            "rule link",
            f"  command = $cxx -shared -o $out $in {words(*libraries)}",
            "  description = $out",
        ]
        objects = []

        def compile_to(name: str, source: Path, flags: list[str]) -> None:
            lines.append(f"build {name}.o: compile {ninja_path(source)}")
            lines.append(f"  flags = {words(*COMMON, *flags)}")
            objects.append(f"{name}.o")

        csrc = ROOT / "csrc"
        levels = chosen_levels()
        listed = " ".join(f"X({level})" for level in levels)
        compile_to("levels", csrc / "levels.cpp", [f"-DLLMCORE_LEVELS(X)={listed}"])
        compile_to("scratch_pool", csrc / "scratch_pool.cpp", [])
        compile_to("exchange", csrc / "exchange.cpp", [])
        compile_to("huge_pages", csrc / "huge_pages.cpp", [])
        compile_to("team", csrc / "team.cpp", [])
        compile_to("module", csrc / "module.cpp", [*binding, *reason])
        compile_to("decoder_plan", csrc / "decoder_plan.cpp", binding)
        for source in sorted((csrc / "register").glob("*.cpp")):
            compile_to(f"register_{source.stem}", source, binding)
        for level, flags in levels.items():
            for source in kernel_sources():
                defines = [f"-DLLMCORE_LEVEL={level}"]
                compile_to(f"{level}_{source.stem}", source, [*KERNEL, *flags, *defines])
        for source in [] if without_cuda else sorted((csrc / "cuda").glob("*.cu")):
            lines.append(f"build cuda_{source.stem}.o: nvcc {ninja_path(source)}")
            lines.append(f"  flags = {words(*nvcc_flags(source))}")
            objects.append(f"cuda_{source.stem}.o")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def ninja_command() -> list[str]:
    found = shutil.which("ninja")
    return [found] if found else [sys.executable, "-m", "ninja"]


def run_and_show(command: list[str]) -> tuple[int, str]:
    """Runs a command, its output shown as it comes: its exit status and the output's last lines."""
    last: collections.deque[str] = collections.deque(maxlen=30)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
    return process.returncode, "".join(last).rstrip()


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
        ext_modules=[Extension("llmcore._native", sources=[], optional=True)],
        cmdclass={"build_ext": NinjaBuild, "build_py": PackageWithTopLevelFolders},
    )
