"""The yardstick: every candidate of every op against its definition in float64.

The rule is measured, not guessed (after FlashAttention's tests): with `gold` the definition in
float64 and `plain` the definition in the working dtype, a kernel passes when

    max|kernel - gold| <= factor * max|plain - gold| + 2 * eps(dtype) * max|gold|

with factor 2 for results and 3 for gradients. Values that are not finite must be the same in both.
Maxima are over the elements where plain and gold are finite. Where plain alone is not (it
overflowed on the way), the kernel must either give what plain gives, or be right by itself:
|kernel - gold| <= the bound above + 2 * eps * |gold|, for each such element.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from llmcore import dispatch, native
from llmcore.dispatch import Op
from llmcore.ops.sample import Draw, Sample

FORWARD_FACTOR, BACKWARD_FACTOR = 2.0, 3.0


@dataclass(frozen=True)
class Verdict:
    """The error of one tensor against its bound."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def judge(got: torch.Tensor, gold: torch.Tensor, plain: torch.Tensor, factor: float) -> Verdict:
    """Holds `got` to the rule above; all three have one shape, gold is float64.

    The verdict's error and bound are of the elements where plain is finite; its error is infinite
    when an element with a rule of its own breaks it.
    """
    if got.shape != gold.shape or got.dtype != plain.dtype:
        return Verdict(float("inf"), 0.0)
    if gold.numel() == 0:
        return Verdict(0.0, 0.0)
    finite = gold.isfinite()
    wide = got.double()
    if not (finite | (wide == gold) | (wide.isnan() & gold.isnan())).all():
        return Verdict(float("inf"), 0.0)
    eps = torch.finfo(plain.dtype).eps
    base = plain.double()
    kept = finite & base.isfinite()
    error = loss = scale = 0.0
    if kept.any():
        error = (wide - gold)[kept].abs().nan_to_num(math.inf, math.inf).amax().item()
        loss = (base - gold)[kept].abs().amax().item()
        scale = gold[kept].abs().amax().item()
    bound = factor * loss + 2 * eps * scale
    lost = finite & ~kept
    as_plain = (wide == base) | (wide.isnan() & base.isnan())
    right = (wide - gold).abs() <= bound + 2 * eps * gold.abs()
    return Verdict(error if (~lost | as_plain | right).all() else math.inf, bound)


def differentiable(
    op: Op, backend: str, sample: Sample, dtype: torch.dtype, device: str = "cpu"
) -> set[int | str]:
    """The floating inputs of a sample for which the backend has a gradient, by position or name.

    Raises:
        BackendError: the backend refuses the call even without any.
    """

    def reasons(names: set[int | str]) -> list[str]:
        args, options = sample.cast(dtype, device)
        for name, tensor in _floating(args, options).items():
            tensor.requires_grad_(name in names)
        candidate = op.candidate(backend)
        if candidate is None:
            return [op.why_absent(backend)]
        return candidate.reasons(*op.arguments(*args, **options))

    with dispatch.use(backend), _seeded(0):
        every = set(_floating(*sample.cast(dtype, device)))
        if not reasons(every):
            return every
        if refusals := reasons(set()):
            raise dispatch.BackendError(f"{op.name}: {backend} cannot run: {'; '.join(refusals)}")
        return {name for name in every if not reasons({name})}


def _floating(args: list[Any], options: dict[str, Any]) -> dict[int | str, torch.Tensor]:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *options.items()]
    return {
        name: value
        for name, value in named
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's default generator starts from `seed`, so that dropout draws the same for everyone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run(
    function: Any,
    sample: Sample,
    dtype: torch.dtype,
    device: str,
    seed: int,
    wanted: Set[int | str] | None = None,
) -> tuple[list[Any], dict[int | str, torch.Tensor]]:
    """function's outputs on a sample, and gradients of its inputs for a random cotangent.

    Gradients are of the inputs in `wanted` (None: of every floating one), by position or name.
    """
    args, options = sample.cast(dtype, device)
    floating = _floating(args, options)
    leaves = {n: t.requires_grad_() for n, t in floating.items() if wanted is None or n in wanted}
    with _seeded(seed):
        result = function(*args, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    draw = Draw(seed)
    pairs = [
        (o, draw.normal(*o.shape).to(o.device, dtype).to(o.dtype))
        for o in outputs
        if o.requires_grad
    ]
    if not pairs:
        return [o.detach() for o in outputs], {}
    grads = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
    )
    return [o.detach() for o in outputs], {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _seed_of(sample: Sample) -> int:
    return zlib.crc32(sample.name.encode())


@functools.lru_cache(maxsize=512)  # an op's samples in every dtype: the same for all its backends
def _expected(
    op: Op, sample: Sample, dtype: torch.dtype, device: str, wanted: frozenset[int | str]
) -> tuple[Any, Any]:
    """The definition's outputs and gradients, in `dtype` and in float64."""
    plain = run(op.define, sample, dtype, device, _seed_of(sample), wanted)
    # The same rounded inputs, widened: rounding them is not the kernel's error.
    args, options = sample.cast(dtype, device)
    exact = Sample(sample.name, tuple(args), options)
    return plain, run(op.define, exact, torch.float64, device, _seed_of(sample), wanted)


def verify_sample(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> dict[str, Verdict]:
    """A verdict for each output ("y0", ...) and gradient ("d0", ...) of a backend on a sample.

    Gradients carry the position or name of their input; those that the backend does not have are
    left out.

    Raises:
        BackendError: the backend refuses the call.
    """
    wanted = differentiable(op, backend, sample, dtype, device)
    (plain, dplain), (gold, dgold) = _expected(op, sample, dtype, device, frozenset(wanted))
    with dispatch.use(backend):
        got, dgot = run(op.function, sample, dtype, device, _seed_of(sample), wanted)
    verdicts = {
        f"y{i}": judge(*t, FORWARD_FACTOR) for i, t in enumerate(zip(got, gold, plain, strict=True))
    }
    verdicts |= {
        f"d{name}": judge(grad, dgold[name], dplain[name], BACKWARD_FACTOR)
        for name, grad in dgot.items()
    }
    assert dgot.keys() == dgold.keys()
    return verdicts


@dataclass(frozen=True)
class Line:
    """What verification found for one op, backend and dtype."""

    op: str
    backend: str
    dtype: str
    samples: int
    worst: float
    failures: tuple[str, ...]
    skipped: str = ""

    def __str__(self) -> str:
        head = f"{self.op:<28}{self.backend:<17}{self.dtype:<9}"
        if self.skipped:
            return f"{head} skipped: {self.skipped}"
        state = "FAILED: " + "; ".join(self.failures) if self.failures else "ok"
        return (
            f"{head}{self.samples:>3} samples, worst error {self.worst:.2f} of the bound  {state}"
        )


class Report(list[Line]):
    """verify()'s answer: its lines; `passed` is True when something ran and nothing failed."""

    @property
    def passed(self) -> bool:
        return any(not line.skipped for line in self) and not any(line.failures for line in self)

    def __str__(self) -> str:
        failed = sum(bool(line.failures) for line in self)
        skipped = sum(bool(line.skipped) for line in self)
        ran = len(self) - skipped
        return "\n".join(
            [*map(str, self), f"{ran - failed} passed, {failed} failed, {skipped} skipped"]
        )


def verify_backend(
    op: Op, backend: str, dtype: torch.dtype, samples: Sequence[Sample], device: str = "cpu"
) -> Line:
    """An op's samples on one backend and dtype."""
    name = str(dtype).removeprefix("torch.")
    candidate = op.candidate(backend)
    why = op.why_absent(backend) if candidate is None else candidate.machine
    if why:
        return Line(op.name, backend, name, 0, 0.0, (), why)
    count, worst, failures, refusals = 0, 0.0, [], []
    for sample in samples:
        try:
            verdicts = verify_sample(op, sample, dtype, backend, device)
        except dispatch.BackendError as error:
            refusals.append(str(error))
            continue
        count += 1
        for tensor, v in verdicts.items():
            worst = max(worst, v.error / v.bound if v.bound else float(v.error > 0))
            if not v.passed:
                failures.append(f"{sample.name} {tensor}: error {v.error:.3g}, bound {v.bound:.3g}")
    return Line(op.name, backend, name, count, worst, tuple(failures), "" if count else refusals[0])


def lines(seed: int, device: str) -> Iterator[Line]:
    """verify() line by line."""
    for op in dispatch.REGISTRY.values():
        samples = list(op.samples(Draw(seed)))
        for backend in dispatch.BACKENDS:
            for dtype in native.DTYPES:
                yield verify_backend(op, backend, dtype, samples, device)
        _expected.cache_clear()


def verify(*, seed: int = 0, device: str = "cpu", progress: bool = False) -> Report:
    """Holds every op here to its definition in float64: all backends, dtypes, results, gradients.

    `seed` draws the random shapes and values; `progress` prints each line as it comes.
    """
    report = Report()
    for line in lines(seed, device):
        report.append(line)
        if progress and not line.skipped:
            print(line, flush=True)
    return report
