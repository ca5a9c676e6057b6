"""The yardstick over random calls: every op, level, dtype, option and gradient.

A case is one call of one level in one dtype, its results and gradients held to the definition's in
float64. Every run has a few hundred of them; `make test-all` has more than 10,000, and says so.

In a call of few elements the definition may round luckily, or to the exact 0 of a gradient that
cancels, and its error is the measure. A tensor over its bound is therefore judged in a group: this
call and others of its shapes and options with its values in other orders. The group's worst error
must be within twice the widest bound of its results, or of its gradients.

That is a looser rule than the one the contracts' own samples are held to (test_registry.py): it is
for faults of shapes, strides and options, which are larger by orders of magnitude. What it does not
look for: errors within twice the bound, and faults that only particular values show. Attention's
scores stay moderate (to about 10): beyond, gradients through lse and sinks cancel to far less than
the terms they are made of, and so do those of a query with one key under dropout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_cases import random_sample

from llmcore import dispatch, native
from llmcore.dispatch import REGISTRY, Op
from llmcore.ops.sample import Sample
from llmcore.verify import verify_sample

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = sorted(REGISTRY)
GROUP, SLACK = 16, 2.0
"""Of the rule above."""

FEW, MANY = 20, 800
"""Cases of an op: in every run, and in the full sweep; attention, with the most options, has four
times as many."""


def levels_of(op: str) -> list[str]:
    """The levels that run here; without any, the test is skipped with the contract's reason."""
    found = {f"cpu_{level}": REGISTRY[op].candidate(f"cpu_{level}") for level in native.LEVELS}
    running = [name for name, candidate in found.items() if candidate and not candidate.machine]
    if not running:
        pytest.skip(REGISTRY[op].why_absent("cpu") if native.module else native.why_not)
    return running


def described(sample: Sample) -> str:
    """Shapes and options of a call, for whoever has to repeat it."""

    def short(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)

    options = ", ".join(f"{name}={short(value)}" for name, value in sample.options.items())
    kept = f" keep={sample.keep}" if sample.keep else ""
    return f"{sample.name}: {', '.join(map(short, sample.args))}; {options}{kept}"


def shuffled(sample: Sample, seed: int) -> Sample:
    """The same call with the elements of each floating tensor in another order."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        order = torch.randperm(value.numel(), generator=generator)
        return value.flatten()[order].view(value.shape)

    args = tuple(map(shuffle, sample.args))
    options = {name: shuffle(value) for name, value in sample.options.items()}
    return Sample(f"{sample.name} shuffled {seed}", args, options, sample.keep)


def failures_of(op: Op, sample: Sample, dtype: torch.dtype, level: str) -> Iterator[str]:
    """What a level gets wrong in a call."""
    verdicts = verify_sample(op, sample, dtype, level)
    if all(v.passed for v in verdicts.values()):
        return
    others = [shuffled(sample, seed) for seed in range(GROUP - 1)]
    group = [verdicts, *(verify_sample(op, other, dtype, level) for other in others)]
    for tensor in verdicts:
        error = max(found[tensor].error for found in group)
        alike = [name for name in verdicts if name[0] == tensor[0]]  # results, or gradients
        bound = SLACK * max(found[name].bound for found in group for name in alike)
        if not error <= bound:
            yield f"{tensor}: error {error:.3g}, bound {bound:.3g} in its group"


def sweep(op: str, cases: int) -> tuple[int, list[str]]:
    """How many cases ran, and what failed."""
    levels, count, failures = levels_of(op), 0, []
    first = zlib.crc32(op.encode()) % 1_000_000
    for seed in range(first, first + cases):
        if count >= cases:
            break
        sample, dtype = random_sample(op, seed), native.DTYPES[seed % len(native.DTYPES)]
        for level in levels:
            try:
                wrong = list(failures_of(REGISTRY[op], sample, dtype, level))
            except dispatch.BackendError:
                continue
            except RuntimeError as error:
                wrong = [str(error)]
            count += 1
            failures += [f"{level} {dtype} {what}; {described(sample)}" for what in wrong]
    return count, failures


def check(op: str, cases: int, record_property: Any) -> None:
    count, failures = sweep(op, cases)
    record_property("random_cases", f"{op}/{count}")
    assert not failures, "\n".join([f"{len(failures)} failures in {count} cases", *failures[:20]])
    assert count >= cases, f"only {count} of {cases} calls were not refused"


@pytest.mark.parametrize("op", OPS)
def test_sweep_some(op: str, record_property: Any) -> None:
    check(op, FEW, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_sweep_all(op: str, record_property: Any) -> None:
    check(op, MANY * 4 if op == "attention" else MANY, record_property)


def test_sweep_draws_every_option() -> None:
    """The generators are worth their name: each option is both there and not, often together."""
    samples = [random_sample("attention", seed) for seed in range(300)]
    used = [{name for name, value in s.options.items() if value is not None} for s in samples]
    names = {"window", "scale", "softcap", "kv_lengths", "q_offset", "sinks", "alibi_slopes"}
    for name in names | {"mask", "dropout_p"}:
        assert 10 < sum(name in options for options in used) < 200, name
    assert sum(len(options & names) >= 3 for options in used) > 30
    assert any(not s.args[0].is_contiguous() for s in samples)
    assert {0, 1} <= {s.args[0].shape[2] for s in samples}


def test_sweep_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose last element is wrong, in rows wider than 64 only."""
    op = REGISTRY["softmax"]
    right = op.candidates[-1]

    def forward(x: torch.Tensor, dim: int) -> torch.Tensor:
        y = right.forward(x, dim).clone()
        if y.ndim and y.shape[-1] > 64:
            y[..., -1] *= 1.01
        return y

    planted = dispatch.Candidate("cpu_portable", forward)
    monkeypatch.setattr(op, "candidates", (planted, right))
    monkeypatch.setattr(op, "chosen", {})
    count, failures = sweep("softmax", 60)
    assert count >= 60 and failures and all("cpu_portable" in failure for failure in failures)
