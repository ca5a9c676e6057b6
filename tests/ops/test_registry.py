"""Tests of every op, made by the registry: a new kernel is under test once it is registered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import executed, prepare

from llmcore import device, dispatch, native
from llmcore.dispatch import BACKENDS, REGISTRY, BackendError, Op
from llmcore.ops.quantize_rows import quantize_rows
from llmcore.ops.sample import Draw, Sample
from llmcore.verify import differentiable, run, verify_sample

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = (0, 1)
KERNELS = [b for b in BACKENDS if b != "reference"]
LEVELS = [f"cpu_{level}" for level in native.LEVELS]
OPS = sorted(REGISTRY)
TINY = [(name, sample) for name, calls in sorted(tiny().items()) for sample in calls]
TINY_IDS = [f"{name}-{sample.name}" for name, sample in TINY]


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@functools.cache
def samples_of(op: Op, seed: int) -> list[Sample]:
    return list(op.samples(Draw(seed)))


def skip_unless_it_runs(op: Op, backend: str) -> None:
    """Skips with the candidate's own reason, or the contract's."""
    candidate = op.candidate(backend)
    why = op.why_absent(backend) if candidate is None else candidate.machine
    if why:
        pytest.skip(why)


def device_of(backend: str) -> str:
    if backend == "triton" and device.triton_is_interpreted():
        prepare()
        return "cpu"
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def samples_that_run(op: Op, backend: str, seed: int, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples that the backend does not refuse; at least one, or the test skips."""
    refusals = []
    for sample in samples_of(op, seed):
        args, options = sample.cast(dtype, device_of(backend))
        candidate = op.candidate(backend)
        assert candidate is not None
        with dispatch.use(backend):
            reasons = candidate.reasons(*op.arguments(*args, **options))
        if reasons:
            refusals.append(f"{sample.name}: {'; '.join(reasons)}")
        else:
            yield sample
    if len(refusals) == len(samples_of(op, seed)):
        pytest.skip(f"every sample is refused: {refusals[0]}")


def test_registry_every_op_has_tiny_calls() -> None:
    assert set(tiny()) == set(REGISTRY)


def test_registry_samples_differ_with_the_seed() -> None:
    for op in REGISTRY.values():
        shapes = [
            [a.shape for s in op.samples(Draw(seed)) for a in s.args if isinstance(a, torch.Tensor)]
            for seed in range(4)
        ]
        assert any(shapes[0] != other for other in shapes[1:]), op.name


# Backends innermost: the definition's results are kept from one to the next.
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", OPS)
def test_registry_kernel_passes_the_yardstick(
    name: str, backend: str, dtype: torch.dtype, record_property: Any
) -> None:
    op = REGISTRY[name]
    record_property("candidate", f"{name}/{backend}")
    skip_unless_it_runs(op, backend)
    if device_of(backend) == "cpu" and backend == "triton":  # slowly: half of the samples, in turn
        part = slice(native.DTYPES.index(dtype), None, 2 * len(native.DTYPES))
        executed.take()
        hold_to_the_yardstick(op, backend, dtype, part, SEEDS[:1])
        record_property("interpreted", executed.take())
    else:
        hold_to_the_yardstick(op, backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", native.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", OPS)
def test_registry_interpreted_kernel_passes_the_yardstick(
    name: str, dtype: torch.dtype, record_property: Any
) -> None:
    """Every sample in every dtype, of Triton's kernels where they run in its interpreter."""
    op = REGISTRY[name]
    skip_unless_it_runs(op, "triton")
    if device_of("triton") != "cpu":
        pytest.skip("Triton's kernels run on a GPU here")
    executed.take()
    hold_to_the_yardstick(op, "triton", dtype)
    record_property("interpreted", executed.take())


def hold_to_the_yardstick(
    op: Op,
    backend: str,
    dtype: torch.dtype,
    part: slice = slice(None),
    seeds: tuple[int, ...] = SEEDS,
) -> None:
    for seed in seeds:
        for sample in list(samples_that_run(op, backend, seed, dtype))[part]:
            for tensor, verdict in verify_sample(
                op, sample, dtype, backend, device_of(backend)
            ).items():
                assert verdict.passed, f"seed {seed}, {sample.name}, {tensor}: {verdict}"


# What follows from a sum that is rounded because it is a result of its own is only near.
FROM_A_ROUNDED_SUM = ("add_layer_norm", "add_rms_norm")


def rounding_bound(name: str, want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of each element, and float32's own error."""
    if want.numel() == 0 or got.dtype == torch.float32:  # an lse
        return 1e-5 * (1 + want.abs())
    limits, largest = torch.finfo(got.dtype), want.abs().amax()
    if name in FROM_A_ROUNDED_SUM:
        return (2 * limits.eps * largest).expand(want.shape)
    return 0.505 * limits.eps * want.abs() + limits.tiny + 3e-6 * (1 + largest)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=dtype_id)
@pytest.mark.parametrize("name", OPS)
def test_registry_reference_rounds_once(
    name: str, dtype: torch.dtype, record_property: Any
) -> None:
    """A definition in a half type is off by half a unit in the last place, no more."""
    record_property("candidate", f"{name}/reference")
    op = REGISTRY[name]
    for sample in op.samples(Draw(0)):
        plain, _ = run(op.define, sample, dtype, "cpu", 0)
        args, options = sample.cast(dtype)
        gold, _ = run(op.define, Sample("", tuple(args), options), torch.float64, "cpu", 0)
        for got, want in zip(plain, gold, strict=True):
            wrong = (got.double() - want).abs() > rounding_bound(name, want, got)
            assert not wrong.any(), f"{sample.name}: {got[wrong][:3]} for {want[wrong][:3]}"


@pytest.mark.parametrize(("name", "sample"), TINY, ids=TINY_IDS)
def test_registry_gradcheck_of_the_reference(name: str, sample: Sample) -> None:
    args, options = sample.cast(torch.float64)
    named: dict[Any, Any] = {**dict(enumerate(args)), **options}
    floating = {
        k: v.clone().requires_grad_()
        for k, v in named.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }

    def call(*tensors: torch.Tensor) -> Any:
        now = {**named, **dict(zip(floating, tensors, strict=True))}
        torch.manual_seed(5)
        return REGISTRY[name].define(
            *(v for k, v in now.items() if isinstance(k, int)),
            **{k: v for k, v in now.items() if isinstance(k, str)},
        )

    assert torch.autograd.gradcheck(call, tuple(floating.values()))
    assert torch.autograd.gradgradcheck(call, tuple(floating.values()))


def compare_compiled(name: str, sample: Sample, backend: str) -> None:
    """Results and gradients of torch.compile(fullgraph=True) against eager."""
    torch._dynamo.reset()
    function = REGISTRY[name].function
    eager = run(function, sample, torch.float32, "cpu", 1)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    again = run(compiled, sample, torch.float32, "cpu", 1)
    torch.testing.assert_close(again, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "sample"), TINY, ids=TINY_IDS)
def test_registry_compiles_fullgraph(name: str, sample: Sample) -> None:
    compare_compiled(name, sample, "aot_eager")


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(n, s, marks=() if n in ("rms_norm", "softmax") else pytest.mark.slow)
        for n, s in TINY
    ],
    ids=TINY_IDS,
)
def test_registry_compiles_with_inductor(name: str, sample: Sample) -> None:
    # Dropout draws its seed inside the graph, where inductor has a generator of its own.
    if sample.name == "dropout":
        torch._inductor.config.fallback_random = True
    try:
        compare_compiled(name, sample, "inductor")
    finally:
        torch._inductor.config.fallback_random = False


@pytest.mark.parametrize("name", OPS)
def test_registry_shapes_without_values(name: str) -> None:
    """On meta tensors every sample gives the shapes and dtypes that it gives on the CPU."""
    op = REGISTRY[name]
    for sample in op.samples(Draw(0)):
        real, real_options = sample.cast(torch.bfloat16)
        meta, meta_options = sample.cast(torch.bfloat16, "meta")
        want, got = op.function(*real, **real_options), op.function(*meta, **meta_options)
        as_tuples = [r if isinstance(r, tuple) else (r,) for r in (want, got)]
        for w, g in zip(*as_tuples, strict=True):
            assert (w.shape, w.dtype) == (g.shape, g.dtype), sample.name
            assert g.device.type == "meta"


@pytest.mark.parametrize("name", OPS)
def test_registry_leaves_its_inputs_untouched(name: str) -> None:
    op = REGISTRY[name]
    for sample in op.samples(Draw(2)):
        args, options = sample.cast(torch.float32)
        tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        op.function(*args, **options)
        for was, now in zip(before, tensors, strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def dtypes_in_turn(backend: str) -> tuple[torch.dtype, ...]:
    """Of the default run: all for the best level here, one for each of the others, which are the
    same body."""
    if backend == f"cpu_{device.best_cpu_level()}":
        return native.DTYPES
    return (native.DTYPES[LEVELS.index(backend) % len(native.DTYPES)],)


@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize("name", OPS)
def test_registry_same_bits_on_any_thread_count(name: str, backend: str) -> None:
    hold_to_the_same_bits(name, backend, dtypes_in_turn(backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize("name", OPS)
def test_registry_same_bits_on_any_thread_count_in_every_dtype(name: str, backend: str) -> None:
    hold_to_the_same_bits(name, backend, native.DTYPES)


def hold_to_the_same_bits(name: str, backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    op = REGISTRY[name]
    skip_unless_it_runs(op, backend)
    for dtype in dtypes:
        for sample in samples_that_run(op, backend, 0, dtype):
            results = []
            for threads in (2, 2, 1):
                torch.set_num_threads(threads)
                wanted = differentiable(op, backend, sample, dtype)
                with dispatch.use(backend):
                    y, d = run(op.function, sample, dtype, "cpu", 7, wanted)
                results.append([*y, *d.values()])
            for again in results[1:]:
                for one, other in zip(results[0], again, strict=True):
                    same = torch.equal(one.nan_to_num(3.0), other.nan_to_num(3.0))
                    assert same, f"{sample.name} in {dtype}"


class RawCalls(TorchDispatchMode):
    """Keeps the first calls of every raw op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llmcore":
            kept = self.calls.setdefault(func.name().removeprefix("llmcore::"), [])
            if len(kept) < 3:
                kept.append((func, tuple(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def room(y: Any) -> Any:
    """Fresh contiguous memory for a result."""
    return tuple(map(room, y)) if isinstance(y, tuple) else torch.empty(y.shape, dtype=y.dtype)


@functools.cache
def raw_calls() -> dict[str, list[Any]]:
    """Calls of the raw ops as the contracts make them on samples: forward, backward, out=."""
    with RawCalls() as mode:
        for op in REGISTRY.values():
            candidate = op.candidate("cpu")
            if candidate is None or candidate.machine:
                continue
            with dispatch.use("cpu"):
                for sample in samples_that_run(op, "cpu", 0, torch.float32):
                    wanted = differentiable(op, "cpu", sample, torch.float32)
                    run(op.function, sample, torch.float32, "cpu", 0, wanted)
                    args, options = sample.cast(torch.float32)
                    if candidate.into is not None:
                        op.function(*args, **options, out=room(op.function(*args, **options)))
        quantize_rows(torch.randn(2, 3, 4))  # which is no op of the registry
    return mode.calls


def raw_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("llmcore::")})


@pytest.mark.parametrize("raw", raw_names())
def test_registry_raw_ops_pass_opcheck(raw: str) -> None:
    calls = raw_calls()
    assert raw in calls, f"{raw}: no sample of any op calls it"
    for func, args, kwargs in calls[raw]:
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, detached, kwargs)


@pytest.mark.parametrize("name", OPS)
def test_registry_errors_name_the_argument(name: str) -> None:
    """Something that is no tensor, and an integer tensor, in place of the first argument."""
    op = REGISTRY[name]
    args, options = tiny()[name][0].cast(torch.float32)
    first = next(iter(inspect.signature(op.function).parameters))
    with pytest.raises(TypeError, match=f"{first}: expected a tensor, got str"):
        op.function("nonsense", *args[1:], **options)
    with pytest.raises(TypeError, match=f"{first}: got torch.int64, expected"):
        op.function(args[0].long(), *args[1:], **options)


@pytest.mark.parametrize("name", OPS)
def test_registry_no_tensor_is_an_error(name: str) -> None:
    """None in place of each tensor that an op cannot do without."""
    op = REGISTRY[name]
    args, options = tiny()[name][0].cast(torch.float32)
    for i, parameter in enumerate(list(inspect.signature(op.function).parameters.values())):
        if i < len(args) and parameter.default is inspect.Parameter.empty:
            with pytest.raises(TypeError, match=rf"{parameter.name}: .*\bNoneType"):
                op.function(*args[:i], None, *args[i + 1 :], **options)


@pytest.mark.parametrize("name", OPS)
def test_registry_float64_runs_on_the_definition(name: str) -> None:
    args, options = tiny()[name][0].cast(torch.float64)
    op = REGISTRY[name]
    assert dispatch.explain(name, *args, **options).chosen == "reference"
    y = op.function(*args, **options)
    assert (y[0] if isinstance(y, tuple) else y).dtype == torch.float64


@pytest.mark.parametrize("name", OPS)
def test_registry_explain_agrees_with_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = REGISTRY[name]
    args, options = tiny()[name][0].cast(torch.float32)
    chosen: list[str] = []
    kernel = op.kernel

    def watched(*call: Any) -> Any:
        chosen.append(kernel(*call).backend)
        return kernel(*call)

    monkeypatch.setattr(op, "kernel", watched)
    op.function(*args, **options)
    assert chosen == [dispatch.explain(name, *args, **options).chosen]


@pytest.mark.parametrize("name", OPS)
def test_registry_absent_backends_say_so(name: str) -> None:
    op = REGISTRY[name]
    args, options = tiny()[name][0].cast(torch.float32)
    for backend in ("triton", "cuda"):
        if op.candidate(backend) is not None:
            continue
        assert op.absent[backend].startswith("no "), backend
        with dispatch.use(backend), pytest.raises(BackendError, match=op.absent[backend]):
            op.function(*args, **options)
