"""The layout as README tells it: every op has its places, or a sentence for each it lacks, and
arrows go one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcore import ops
from llmcore.dispatch import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
BODIES = {"attention_varlen": "attention", "paged_attention": "attention"}
"""Ops whose kernels are another op's, which finds keys and values in more than one way."""

SHARED = (
    *("runtime", "roofline"),
    *(
        "linear_quantized",
        "store_rows",
        "cuda",
    ),  # linear with weights of another kind; filling caches
    *(
        "launch",
        "row_norm",
        "activation",
        "attention_scores",
        "attention_backward",
        "attention_sm90",
    ),  # of several ops in Triton
)
"""Kernel files that no one op owns."""

FAMILIES = {
    "cpu": ("csrc/cpu/{body}.cpp", "csrc/register/{op}.cpp", "benchmarks/bench_{op}.py"),
    "triton": ("kernels/{op}.py",),
    "cuda": ("csrc/cuda/{op}.cu", "csrc/register/{op}.cpp"),
}

# Each may import from those on lines above it, and from its own.
LAYERS = (
    ("storage",),
    ("packages",),
    ("native",),
    ("device", "gpu_table"),
    ("dispatch",),
    ("kernels",),
    ("ops",),
    ("attention_mask", "eager_attention", "patch_sdpa"),
    ("attention_interface",),
    ("verify", "text"),
    ("models", "history"),
    ("generation", "swap"),
    ("generate", "evaluate", "accelerate"),
    ("train",),
    ("model_arguments",),
    (
        "benchmarks",
        "demo",
        "history_demo",
        "similarity_demo",
        "translate_demo",
        "data_inspect_command",
        "pretrain_command",
        "verify_command",
        "backends_command",
        "chat_command",
        "generate_command",
        "serve_command",
        "evaluate_command",
    ),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("op", REGISTRY)
def test_layout_places(op: str) -> None:
    assert (ROOT / f"llmcore/ops/{op}.py").is_file()
    assert (ROOT / f"tests/ops/test_{op}.py").is_file()
    for family, places in FAMILIES.items():
        has_kernel = any(c.backend.split("_")[0] == family for c in REGISTRY[op].candidates)
        if has_kernel:
            names = {"op": op, "body": BODIES.get(op, op)}
            missing = [p for p in places if not (ROOT / p.format(**names)).is_file()]
            assert not missing, f"{op} has a {family} kernel, but not {missing}"
        else:
            assert REGISTRY[op].absent.get(family), (
                f"{op}: no sentence on why it has no {family} kernel"
            )


@pytest.mark.parametrize("op", REGISTRY)
def test_layout_contract(op: str) -> None:
    contract = REGISTRY[op]
    assert contract.candidates[-1].backend == "reference"
    assert op in ops.__all__
    source = ast.parse((ROOT / f"llmcore/ops/{op}.py").read_text())
    assert ast.get_docstring(source)
    assert contract.function.__doc__ and "Raises" in contract.function.__doc__


def test_layout_no_stray_kernels() -> None:
    """A kernel file that no op owns is dead, or misnamed."""
    known = set(REGISTRY)
    places = (("kernels", "*.py"), ("csrc/register", "*.cpp"), ("csrc/cuda", "*.cu"))
    for folder, pattern in places:
        for path in (ROOT / folder).glob(pattern):
            shared = path.stem in SHARED
            assert shared or path.stem in known, f"{path.name} belongs to no op"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"


def imports_of(path: Path) -> Iterator[str]:
    """The llmcore modules a file imports, as "ops.rms_norm"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module == "llmcore" else [module]
        else:
            continue
        yield from (n.removeprefix("llmcore.") for n in names if n.startswith("llmcore."))


def python_files() -> list[Path]:
    files = [p for p in (ROOT / "llmcore").rglob("*.py") if p != ROOT / "llmcore/__init__.py"]
    return sorted(files)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_layout_arrows(path: Path) -> None:
    own = path.relative_to(ROOT / "llmcore").parts[0].removesuffix(".py")
    assert own in RANK, f"{own} stands in no layer: give it one here"
    for imported in imports_of(path):
        other = imported.split(".")[0]
        assert other in RANK, f"imports llmcore.{imported}, which stands in no layer"
        allowed = other == own or RANK[other] < RANK[own]
        assert allowed, f"llmcore.{own} may not import llmcore.{imported}: arrows go down"


def test_layout_kernels_know_nothing_above() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert not list(imports_of(path)), path.name
    native = [*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc/cuda").iterdir()]
    for path in [*native, *(ROOT / "csrc").glob("[lo]*")]:
        assert not re.search(r"#include <(torch|pybind11|Python)", path.read_text()), path.name


def test_layout_bodies_name_no_instruction_set() -> None:
    """Only vec.h and quad_products.h know instructions; gemm_tile.h the number of registers."""
    for path in (ROOT / "csrc/cpu").iterdir():
        if path.name in ("vec.h", "quad_products.h", "gemm_tile.h"):
            continue
        found = re.search(r"__AVX|__SSE|_mm\d*_|__m\d{3}|\bavx", path.read_text())
        assert not found, f"{path.name}: {found and found.group()}"


def test_layout_builtins_of_gcc_have_a_twin() -> None:
    """Clang has no __builtin_shuffle: it stands once, where lanes.h asks for the compiler."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc/cpu").iterdir()))
    assert len(re.findall(r"__builtin_shuffle\b", sources)) == 1
    assert re.search(r"#if defined\(__clang__\).*\n.*\n#else\n.*__builtin_shuffle\(", sources)


def test_layout_levels_agree() -> None:
    """setup.py, csrc/ops.h and llmcore/native.py name the same levels."""
    from llmcore import native

    setup = re.findall(r'"(portable|avx\w+)": ', (ROOT / "setup.py").read_text())
    header = re.search(r"LLMCORE_LEVELS\(X\) (.*)", (ROOT / "csrc/ops.h").read_text())
    assert header is not None
    assert re.findall(r"X\((\w+)\)", header.group(1)) == setup
    assert list(reversed(setup)) == list(native.LEVELS)
