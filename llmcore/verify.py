"""The yardstick: every candidate of every op against its definition in float64.

The rule is measured, not guessed (after FlashAttention's tests): with `gold` the definition in float64 and `plain` the
definition in the working dtype, a kernel passes when

    max|kernel - gold| <= factor * max|plain - gold| + 2 * eps(dtype) * max|gold|

with factor 2 for results and 3 for gradients. Values that are not finite must be the same in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
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
    """Holds `got` to the rule above; all three have one shape, gold is float64."""
    if got.shape != gold.shape or got.dtype != plain.dtype:
        return Verdict(float("inf"), 0.0)
    if gold.numel() == 0:
        return Verdict(0.0, 0.0)
    finite = gold.isfinite()
    wide = got.double()
    if not torch.equal(wide[~finite].nan_to_num(3.0), gold[~finite].nan_to_num(3.0)):
        return Verdict(float("inf"), 0.0)
    error = (
        (wide - gold)[finite].abs().nan_to_num(float("inf")).amax().item() if finite.any() else 0.0
    )
    loss = (
        (plain.double() - gold)[finite].abs().nan_to_num(0.0).amax().item() if finite.any() else 0.0
    )
    scale = gold[finite].abs().amax().item() if finite.any() else 0.0
    return Verdict(error, factor * loss + 2 * torch.finfo(plain.dtype).eps * scale)


def _leaves(values: list[Any]) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def run(
    function: Any, sample: Sample, dtype: torch.dtype, device: str, seed: int
) -> tuple[list[Any], list[Any]]:
    """Outputs, and the gradients of every floating input under a random cotangent, of function on a sample."""
    args, options = sample.cast(dtype, device)
    leaves = [t.requires_grad_() for t in _leaves([*args, *options.values()])]
    result = function(*args, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    draw = Draw(seed)
    pairs = [
        (o, draw.normal(*o.shape).to(o.device, dtype).to(o.dtype))
        for o in outputs
        if o.requires_grad
    ]
    if not pairs or not leaves:
        return [o.detach() for o in outputs], []
    grads = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True
    )
    return [o.detach() for o in outputs], [
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
    ]


def verify_sample(
    op: Op, sample: Sample, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> dict[str, Verdict]:
    """One verdict for each output ("y0", ...) and each gradient ("d0", ...) of a backend on a sample.

    Raises:
        BackendError: the backend refuses the call.
    """
    seed = zlib.crc32(sample.name.encode())
    plain, dplain = run(op.reference, sample, dtype, device, seed)
    # The same rounded inputs, widened: rounding them is not the kernel's error.
    args, options = sample.cast(dtype, device)
    gold, dgold = run(
        op.reference, Sample(sample.name, tuple(args), options), torch.float64, device, seed
    )
    with dispatch.use(backend):
        got, dgot = run(op.function, sample, dtype, device, seed)
    verdicts = {
        f"y{i}": judge(*t, FORWARD_FACTOR) for i, t in enumerate(zip(got, gold, plain, strict=True))
    }
    verdicts |= {
        f"d{i}": judge(*t, BACKWARD_FACTOR)
        for i, t in enumerate(zip(dgot, dgold, dplain, strict=True))
    }
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


def verify_backend(op: Op, backend: str, dtype: torch.dtype, seed: int, device: str) -> Line:
    """Every sample of an op on one backend and dtype."""
    name = str(dtype).removeprefix("torch.")
    candidate = op.candidate(backend)
    why = op.why_absent(backend) if candidate is None else candidate.machine
    if why:
        return Line(op.name, backend, name, 0, 0.0, (), why)
    count, worst, failures, refusals = 0, 0.0, [], []
    for sample in op.samples(Draw(seed)):
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
        for backend in dispatch.BACKENDS:
            for dtype in native.DTYPES:
                yield verify_backend(op, backend, dtype, seed, device)


def verify(*, seed: int = 0, device: str = "cpu", progress: bool = False) -> Report:
    """Holds every op on this machine to its definition in float64: all backends, dtypes, results and gradients.

    `seed` draws the random shapes and values; `progress` prints each line as it comes.
    """
    report = Report()
    for line in lines(seed, device):
        report.append(line)
        if progress and not line.skipped:
            print(line, flush=True)
    return report
