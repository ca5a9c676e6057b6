"""The yardstick itself: planted faults must be refused, honest kernels accepted.

A fault stands in for a kernel, as the candidate "triton" of the op, and is held to the op's
samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted_faults import (
    DTYPES,
    FAULTS,
    Kernel,
    define,
    gradient_times,
    softmax_without_the_maximum,
)
from triton_interpreter import prepare

from llmcore import device, dispatch
from llmcore.dispatch import REGISTRY, Candidate, Op
from llmcore.ops import contract
from llmcore.ops.attention_definition import Extra, Options
from llmcore.ops.linear import as_multiplied
from llmcore.ops.packed_weight import PackedWeight
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import (
    Line,
    Report,
    Verdict,
    differentiable,
    judge,
    verify,
    verify_backend,
    verify_sample,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Kernel], Op]:
    """plant(name, kernel): the op with that kernel as its candidate "triton"."""

    def plant(name: str, kernel: Kernel) -> Op:
        op = REGISTRY[name]
        monkeypatch.setattr(op, "candidates", (Candidate("triton", kernel), op.candidates[-1]))
        monkeypatch.setattr(op, "chosen", {})
        return op

    return plant


@functools.cache
def samples_of(op: Op, seed: int) -> list[Sample]:
    return list(op.samples(Draw(seed)))


def failures(
    op: Op, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda name: True, seed: int = 0
) -> list[str]:
    """What the yardstick refuses of the planted kernel on the wanted samples, at least one."""
    samples = [s for s in samples_of(op, seed) if wanted(s.name)]
    assert samples
    return [
        f"{sample.name} {tensor}: {verdict}"
        for sample in samples
        for tensor, verdict in verify_sample(op, sample, dtype, "triton").items()
        if not verdict.passed
    ]


@pytest.mark.parametrize(
    ("name", "fault", "sample", "dtype"),
    [
        pytest.param(name, fault, sample, dtype, id=f"{fault.__name__}-{dtype_name(dtype)}")
        for name, fault, sample, dtypes in FAULTS
        for dtype in dtypes
    ],
)
def test_verify_refuses_a_planted_fault(
    planted: Callable[[str, Kernel], Op],
    name: str,
    fault: Kernel,
    sample: str,
    dtype: torch.dtype,
) -> None:
    op = planted(name, fault)
    assert failures(op, dtype, lambda found: found == sample)
    planted(name, op.reference)
    assert not failures(op, dtype, lambda found: found == sample)


GRADIENT_SAMPLES = {
    "rms_norm": "2x3x341",
    "softmax": "2x3x341",
    "rope": "half_split_part",
    "linear": "33x64x31",
    "attention": "1x2x2x33x65x24x40_causal",
}


@pytest.mark.parametrize("name", GRADIENT_SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_verify_refuses_a_gradient_off_by_five_percent(
    planted: Callable[[str, Kernel], Op], name: str, dtype: torch.dtype
) -> None:
    def wanted(found: str) -> bool:
        return found == GRADIENT_SAMPLES[name]

    wrong = failures(planted(name, gradient_times(1.05, name)), dtype, wanted)
    assert wrong and all(" d" in line for line in wrong)
    assert not failures(planted(name, gradient_times(1.0, name)), dtype, wanted)


# Honest kernels: other orders of summation and other roundings that the contracts allow.


def honest_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """Sums of squares by halves, a division in place of rsqrt."""
    wide = x.float()
    half = x.shape[-1] // 2
    squares = wide[..., :half].square().sum(-1) + wide[..., half:].square().sum(-1)
    y = wide / (squares / x.shape[-1] + eps).sqrt()[..., None]
    return (y if weight is None else y * weight).to(x.dtype)


def honest_softmax(x: Any, dim: int) -> Any:
    """By powers of 2, as kernels do."""
    if x.shape[dim] == 0:
        return x.clone()
    wide = x.float()
    e = torch.exp2((wide - wide.amax(dim, keepdim=True)) * math.log2(math.e))
    return (e * (1 / e.sum(dim, keepdim=True))).to(x.dtype)


def honest_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Blocks along K, added up in float32."""
    wide = as_multiplied(x.float(), weight)
    full = weight.dequantize() if isinstance(weight, PackedWeight) else weight
    total = torch.zeros(*x.shape[:-1], full.shape[0])
    for part, columns in zip(wide.split(24, -1), full.float().split(24, -1), strict=True):
        total = total + part @ columns.T
    return (total if bias is None else total + bias.float()).to(x.dtype)


def honest_attention(q: Any, k: Any, v: Any, extra: Extra, options: Options) -> Any:
    """Online softmax over blocks of 32 keys, weights rounded to the dtype, as FlashAttention."""
    plain = extra == Extra() and options.window is None
    if not plain or options.softcap is not None or options.return_lse or 0 in k.shape:
        return define("attention", q, k, v, extra, options)
    share = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.float().repeat_interleave(share, 1) for t in (k, v))
    place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    peak = torch.full((*q.shape[:3], 1), -1e30)
    total, y = torch.zeros_like(peak), torch.zeros(*q.shape[:3], v.shape[3])
    for start in range(0, k.shape[2], 32):
        scores = q.float() @ wide_k[:, :, start : start + 32].mT * options.scale
        if options.causal:
            hidden = torch.arange(start, start + scores.shape[-1]) > place
            scores = scores.masked_fill(hidden, -math.inf)
        higher = torch.maximum(peak, scores.detach().amax(-1, keepdim=True))
        shrink, e = torch.exp(peak - higher), torch.exp(scores - higher)
        total = total * shrink + e.sum(-1, keepdim=True)
        y = y * shrink + e.to(q.dtype).float() @ wide_v[:, :, start : start + 32]
        peak = higher
    return (y / total.masked_fill(total == 0, 1.0)).to(q.dtype)


@pytest.mark.parametrize(
    "kernel", [honest_rms_norm, honest_softmax, honest_linear, honest_attention]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_verify_accepts_an_honest_kernel(
    planted: Callable[[str, Kernel], Op], kernel: Kernel, dtype: torch.dtype
) -> None:
    name = kernel.__name__.removeprefix("honest_")
    op = planted(name, kernel)
    for seed in (0, 1):
        # Of attention's samples only those that the stand-in computes itself.
        own = (lambda found: found[0].isdigit()) if name == "attention" else (lambda found: True)
        assert failures(op, dtype, own, seed) == []


# The rule.


def verdict(got: list[float], gold: list[float], plain: list[float] | None = None) -> Verdict:
    return judge(
        torch.tensor(got),
        torch.tensor(gold, dtype=torch.float64),
        torch.tensor(gold if plain is None else plain),
        2.0,
    )


def test_judge_is_twice_the_definitions_error_and_two_eps() -> None:
    eps = torch.finfo(torch.float32).eps
    assert verdict([4.0 + 7 * eps], [4.0]).passed  # 2 eps of 4
    assert not verdict([4.0 + 12 * eps], [4.0]).passed
    assert verdict([4.0 + 0.0019], [4.0], [4.001]).passed
    assert not verdict([4.0 + 0.0021], [4.0], [4.001]).passed


@pytest.mark.parametrize(
    ("got", "gold", "passed"),
    [
        ([math.nan], [math.nan], True),
        ([1.0], [math.nan], False),
        ([math.nan], [1.0], False),
        ([math.inf], [math.inf], True),
        ([-math.inf], [math.inf], False),
        ([math.inf], [1.0], False),
        ([math.nan], [math.inf], False),
        ([3.0], [math.nan], False),  # whatever stands in for NaN inside
    ],
    ids=str,
)
def test_judge_values_that_are_not_finite(
    got: list[float], gold: list[float], passed: bool
) -> None:
    assert verdict(got, gold).passed == passed
    assert verdict([1.0, *got], [1.0, *gold]).passed == passed


def test_judge_shape_dtype_and_nothing() -> None:
    gold = torch.ones(3, dtype=torch.float64)
    assert not judge(torch.ones(4), gold, torch.ones(3), 2.0).passed
    assert not judge(torch.ones(3).half(), gold, torch.ones(3), 2.0).passed
    assert judge(torch.ones(0), gold[:0], torch.ones(0), 2.0).passed


def test_verify_sample_reports_results_and_gradients() -> None:
    op = REGISTRY["attention"]
    sample = next(s for s in op.samples(Draw(0)) if s.name == "no_keys")
    verdicts = verify_sample(op, sample, torch.float32, "reference")
    assert list(verdicts) == ["y0", "y1", "d0", "d1", "d2"]


def test_verify_judges_forward_where_a_gradient_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel without a gradient for the mask is held to all the rest."""
    op = REGISTRY["masked_softmax"]

    def refuses(x: Any, mask: Any, causal: bool, scale: float) -> list[str]:
        return ["mask requires a gradient"] if contract.wants_gradient(mask) else []

    candidate = Candidate("triton", op.reference, refuses=refuses)
    monkeypatch.setattr(op, "candidates", (candidate, op.candidates[-1]))
    monkeypatch.setattr(op, "chosen", {})
    sample = next(s for s in op.samples(Draw(0)) if s.name == "float_mask")
    assert differentiable(op, "triton", sample, torch.float32) == {0}
    assert list(verify_sample(op, sample, torch.float32, "triton")) == ["y0", "d0"]
    assert list(verify_sample(op, sample, torch.float32, "reference")) == ["y0", "d0", "dmask"]


def test_verify_backend_runs_the_backend_it_is_told(
    planted: Callable[[str, Kernel], Op],
) -> None:
    op = planted("softmax", softmax_without_the_maximum)
    samples = list(op.samples(Draw(0)))
    wrong = verify_backend(op, "triton", torch.float32, samples)
    assert wrong.failures and wrong.worst > 1 and wrong.samples > 5
    assert not verify_backend(op, "reference", torch.float32, samples).failures
    absent = verify_backend(op, "cuda", torch.float32, samples)
    assert absent.skipped == op.why_absent("cuda") and absent.samples == 0


def test_verify_report() -> None:
    ran = Line("softmax", "cpu", "float32", 3, 0.5, ())
    skipped = Line("softmax", "cuda", "float32", 0, 0.0, (), "no CUDA kernel yet")
    failed = Line("softmax", "cpu", "float32", 3, 7.0, ("strided y0: error 7, bound 1",))
    assert Report([ran, skipped]).passed
    assert not Report([ran, failed]).passed
    assert not Report([skipped]).passed and not Report().passed  # nothing ran: nothing passed
    text = str(Report([ran, failed, skipped]))
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "FAILED: strided y0: error 7" in text and "skipped: no CUDA kernel yet" in text


@pytest.mark.slow
def test_verify_this_machine() -> None:
    if device.triton_is_interpreted() and device.triton_reason() is None:
        prepare()  # which another file's tests may have done, or not
    report = verify()
    assert report.passed, str(report)
    assert {line.op for line in report} == set(REGISTRY)
    assert dispatch.forced is None


def test_verify_leaves_the_generator_alone() -> None:
    op, before = REGISTRY["attention"], torch.get_rng_state()
    sample = next(s for s in op.samples(Draw(0)) if s.name == "dropout_0.1")
    assert verify_sample(op, sample, torch.float32, "reference")["y0"].passed
    assert torch.equal(torch.get_rng_state(), before)


def test_judge_accepts_torchs_own_layer_norm() -> None:
    """torch's own layer_norm, another implementation by other people, passes."""
    x, weight = torch.randn(4, 65), torch.randn(65)
    gold = REGISTRY["layer_norm"].reference(x.double(), weight.double(), None, 1e-5)
    plain = REGISTRY["layer_norm"].reference(x, weight, None, 1e-5)
    assert judge(F.layer_norm(x, (65,), weight), gold, plain, 2.0).passed


def test_judge_is_not_blinded_by_a_plain_that_overflowed() -> None:
    gold = torch.tensor([70000.0, 1.0], dtype=torch.float64)
    plain = torch.tensor([float("inf"), 1.0], dtype=torch.float16)
    wrong = torch.tensor([1.0, -999.0], dtype=torch.float16)
    assert not judge(wrong, gold, plain, 2.0).passed
    half_wrong = torch.tensor([1.0, 1.0], dtype=torch.float16)
    assert not judge(half_wrong, gold, plain, 2.0).passed
    assert judge(plain.clone(), gold, plain, 2.0).passed
