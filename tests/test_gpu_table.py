"""The table of which GPU kernel is the faster: written, read, and what dispatch makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore import device, gpu_table
from llmcore.dispatch import REGISTRY, Candidate, Op

GPU = "Some GPU"
FEW, MANY = (2, 64), (4096, 64)
FEW_CLASS, MANY_CLASS = "float32, few rows, width to 1024", "float32, many rows, width to 1024"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "table.json"
    monkeypatch.setenv("LLMCORE_GPU_TABLE", str(path))
    return path


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    """An op with both kernels, on a machine where every tensor is on the GPU."""
    monkeypatch.setattr(device, "gpu_name", lambda x: "" if x is None else GPU)
    candidates = tuple(Candidate(name, lambda x: x) for name in ("cuda", "triton", "cpu"))
    yield Op("double", lambda x: 2 * x, lambda x: None, lambda draw: iter(()), candidates)
    del REGISTRY["double"]


def test_gpu_table_without_a_file(file: Path, double: Op) -> None:
    assert gpu_table.table() == {}
    assert llmcore.explain("double", torch.zeros(FEW)).chosen == "cuda"


def test_gpu_table_says_which_goes_first(file: Path, double: Op) -> None:
    times = [
        ("double", FEW_CLASS, {"cuda": 3e-6, "triton": 2e-6}),
        ("double", FEW_CLASS, {"cuda": 1e-6, "triton": 1.4e-6}),  # 2.8 against 3: together triton
        ("double", MANY_CLASS, {"cuda": 1e-6, "triton": 2e-6}),
        ("double", "bfloat16, few rows, width to 1024", {"triton": 1e-6}),
    ]
    assert gpu_table.write(GPU, times) == file
    few = llmcore.explain("double", torch.zeros(FEW))
    assert few.chosen == "triton"
    assert "measured on Some GPU (float32, few rows, width to 1024): cuda 1.7 us" in str(few)
    assert double.kernel(None, torch.zeros(MANY)).backend == "cuda"
    other = llmcore.explain("double", torch.zeros(FEW, dtype=torch.bfloat16))
    assert other.chosen == "cuda" and not other.measured


def test_gpu_table_keeps_what_was_not_measured_again(file: Path, double: Op) -> None:
    slow, fast = {"cuda": 2.0, "triton": 1.0}, {"cuda": 1.0, "triton": 2.0}
    gpu_table.write("Another", [("double", FEW_CLASS, fast)])
    gpu_table.write(GPU, [("double", FEW_CLASS, slow), ("double", MANY_CLASS, slow)])
    gpu_table.write(GPU, [("double", MANY_CLASS, fast)])
    found = gpu_table.table()
    assert found["Another"]["double"] == {FEW_CLASS: pytest.approx(fast)}
    expected = {FEW_CLASS: pytest.approx(slow), MANY_CLASS: pytest.approx(fast)}
    assert found[GPU]["double"] == expected


def test_gpu_table_forced_backend_stays(file: Path, double: Op) -> None:
    gpu_table.write(GPU, [("double", FEW_CLASS, {"cuda": 2.0, "triton": 1.0})])
    with llmcore.use("cuda"):
        assert llmcore.explain("double", torch.zeros(FEW)).chosen == "cuda"


@pytest.mark.parametrize("text", ["[1]", '{"GPU": {"rms_norm": {"x": {"cuda": 1}}}}', "{"])
def test_gpu_table_refuses_another_file(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match="not a table of GPU kernels"):
        gpu_table.table()


def test_gpu_table_classes() -> None:
    assert gpu_table.rows_class(torch.zeros(FEW)) == FEW_CLASS
    assert gpu_table.rows_class(torch.zeros(1)) == FEW_CLASS
    assert gpu_table.rows_class(torch.zeros(MANY)) == MANY_CLASS
    wide = torch.zeros(1, 9000, dtype=torch.float16)
    assert gpu_table.rows_class(wide) == "float16, few rows, width above 8192"
    step, prompt = torch.zeros(2, 4, 1, 64), torch.zeros(2, 4, 100, 64)
    assert gpu_table.attention_class(step) == "float32, decoding, D 64"
    assert gpu_table.attention_class(prompt) == "float32, prompt, D 64"
