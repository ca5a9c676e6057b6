"""`pytest benchmarks/` times by pytest-benchmark what `llmcore bench --quick` times, on all cores.

Only here are `bench_<op>.py` files collected. Each contender of a quick case is a test: it is
verified first, and skipped with the reason where it cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore.benchmarks import cases, contest, machine, timing
from llmcore.ops.sample import Draw, Sample

SETTINGS = contest.Settings(timing.QUICK, quick=True)


class BenchFile(pytest.File):
    """The quick cases of one op."""

    def collect(self) -> Iterator[pytest.Item]:
        bench = cases.benches()[self.path.stem.removeprefix("bench_")]
        for case in cases.cases(bench, ("fp32", "bf16"), quick=True):
            for place, taker in enumerate(contest.line_up(case, SETTINGS)):
                name = f"{case.shape.label} {case.dtype} {case.mode}-{taker.name}"
                function = timed(case, place)
                yield pytest.Function.from_parent(
                    self, name=name.replace(" ", "_"), callobj=function
                )


def is_bench(path: Path) -> bool:
    is_named_so = path.suffix == ".py" and path.stem.startswith("bench_")
    return is_named_so and path.stem != "bench_generate"  # of whole models: a command only


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    # A file that is named on the command line goes to the hook below by itself.
    if is_bench(file_path) and not parent.session.isinitpath(file_path):
        return BenchFile.from_parent(parent, path=file_path)
    return None


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Collector | None:
    return BenchFile.from_parent(parent, path=module_path) if is_bench(module_path) else None


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> None:
        pytest.skip("pytest-benchmark is not installed (pip install 'llmcore[bench]')")


@functools.lru_cache(maxsize=1)
def data(case: cases.Case) -> tuple[Sample, contest.Yardstick]:
    """A case's arguments and the yardstick for them, kept for the contenders that follow."""
    sample = case.bench.sample(case.shape, Draw(0))
    return sample, contest.Yardstick(case, sample)


def timed(case: cases.Case, place: int) -> Callable[[Any], None]:
    """A test of the contender at one place of a case's line-up."""

    def test(benchmark: Any) -> None:
        torch.set_num_threads(machine.cores())
        torch._dynamo.reset()
        taker = list(contest.line_up(case, SETTINGS))[place]
        if isinstance(taker, contest.Entry):
            pytest.skip(taker.why_not)
        sample, yardstick = data(case)
        with torch._functorch.config.patch(donated_buffer=False):
            entry, contender = contest.admit(taker, yardstick, [sample], cases.DTYPES[case.dtype])
            if contender is None and entry.side == contest.OURS and entry.error is not None:
                pytest.fail(f"{entry.name}: {entry.why_not}")
            if contender is None:
                pytest.skip(entry.why_not)
            benchmark.extra_info.update(bytes=case.work.bytes, flops=case.work.flops)
            with contender.context():
                benchmark(contender.call)

    return test
