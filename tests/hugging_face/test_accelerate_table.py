"""docs/accelerate.md says of every family what is swapped and what is left: as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
bench = pytest.importorskip("benchmarks.bench_accelerate", reason="no checkout: no benchmarks")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "accelerate.md"
LARGEST_DIFFERENCE = 1e-4


def cells_of_docs() -> dict[str, list[str]]:
    """The cells behind a family's name in the table that `llmcore bench accelerate` prints."""
    lines = DOCS.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    begin = lines.index(bench.HEADER[0]) + len(bench.HEADER)
    return {row[0]: row[1:] for row in rows[begin : begin + len(bench.FAMILIES)]}


FAST = ("Llama", "BERT")
FAMILIES = [
    pytest.param(f, id=f.name, marks=[] if f.name in FAST else pytest.mark.slow)
    for f in bench.FAMILIES
]


@pytest.mark.parametrize("family", FAMILIES)
def test_docs_say_what_is_swapped(family):
    stock = bench.build(family)
    row = bench.swapped_row(family, stock, copy.deepcopy(stock))
    swapped, left, difference = cells_of_docs()[family.name][:3]
    assert (swapped, left) == (bench.swapped_text(row), ", ".join(row.left))
    assert row.difference <= LARGEST_DIFFERENCE and float(difference) <= LARGEST_DIFFERENCE
