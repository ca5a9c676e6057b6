"""Which candidate runs, what is said about the others, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.cases import tiny
from torch._subclasses import FakeTensorMode

import llmcore
from llmcore import cli, device, dispatch, native, ops
from llmcore.dispatch import BACKENDS, REGISTRY, BackendError, Candidate, Op
from llmcore.ops.sample import Draw


@pytest.fixture
def double() -> Iterator[Op]:
    """An op of our own: y = 2 x; its candidates say in their result who ran."""
    calls: list[str] = []

    def check(x: torch.Tensor, factor: int = 2) -> None:
        calls.append("check")
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")

    def small_only(x: torch.Tensor, factor: int) -> list[str]:
        return [] if x.numel() < 10 else [f"{x.numel()} elements: this kernel takes up to 9"]

    op = Op(
        "double",
        lambda x, factor: "reference",
        check,
        lambda draw: iter(()),
        (
            Candidate("cuda", lambda x, factor: "cuda", machine="torch finds no GPU"),
            Candidate("cpu", lambda x, factor: "cpu", refuses=small_only),
            Candidate("cpu_avx2", lambda x, factor: "cpu_avx2"),
        ),
        triton="no Triton kernel: two times is not worth one",
    )
    op.calls = calls  # type: ignore[attr-defined]
    yield op
    del REGISTRY["double"]


def who_runs(op: Op, x: torch.Tensor) -> str:
    return op.kernel((x.shape,), x, 2).forward(x, 2)


def test_dispatch_first_that_does_not_refuse(double: Op) -> None:
    assert who_runs(double, torch.zeros(3)) == "cpu"
    assert who_runs(double, torch.zeros(30)) == "reference"  # a single level runs by name only


def test_dispatch_use_forces(double: Op) -> None:
    with llmcore.use("cpu_avx2"):
        assert who_runs(double, torch.zeros(30)) == "cpu_avx2"
    with llmcore.use("reference"):
        assert who_runs(double, torch.zeros(3)) == "reference"
    assert who_runs(double, torch.zeros(3)) == "cpu"


def test_dispatch_use_nests_and_restores_after_exceptions(double: Op) -> None:
    with llmcore.use("cpu"):
        with pytest.raises(KeyError), llmcore.use("reference"):
            assert dispatch.forced == "reference"
            raise KeyError
        assert dispatch.forced == "cpu"
        with llmcore.use("cpu_avx2"):
            assert who_runs(double, torch.zeros(3)) == "cpu_avx2"
        assert who_runs(double, torch.zeros(3)) == "cpu"
    assert dispatch.forced is None


def test_dispatch_use_unknown_name() -> None:
    message = "backend: got 'gpu', expected one of cuda, triton, torch, cpu"
    with pytest.raises(ValueError, match=message), llmcore.use("gpu"):
        pass
    assert dispatch.forced is None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "double: cuda was asked for and cannot run: torch finds no GPU"),
        ("triton", "double: triton was asked for .*: no Triton kernel: two times"),
        ("cpu", "double: cpu was asked for .*: 30 elements: this kernel takes up to 9"),
        ("cpu_avx512", "double: cpu_avx512 was asked for .*: double has no cpu kernel"),
    ],
)
def test_dispatch_forced_and_refusing_is_an_error(double: Op, backend: str, message: str) -> None:
    with llmcore.use(backend), pytest.raises(BackendError, match=message):
        who_runs(double, torch.zeros(30))


def test_dispatch_checks_once_for_each_key(double: Op) -> None:
    calls: list[str] = double.calls  # type: ignore[attr-defined]
    for _ in range(3):
        who_runs(double, torch.zeros(3))
    assert len(calls) == 1
    who_runs(double, torch.zeros(4))
    assert len(calls) == 2
    with llmcore.use("reference"):
        who_runs(double, torch.zeros(3))
    assert len(calls) == 3


def test_dispatch_without_a_key_checks_every_time(double: Op) -> None:
    calls: list[str] = double.calls  # type: ignore[attr-defined]
    for _ in range(2):
        double.kernel(None, torch.zeros(3), 2)
    assert len(calls) == 2 and not double.chosen


def test_dispatch_refused_arguments_are_not_remembered(double: Op) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match="x: expected a tensor, got str"):
            double.kernel(("a key",), "nonsense", 2)
    assert not double.chosen


def test_dispatch_forgets_before_it_grows_without_bound(double: Op) -> None:
    x = torch.zeros(3)
    for i in range(5000):
        double.kernel(i, x, 2)
    assert len(double.chosen) <= 4096


def test_explain_says_who_runs_and_why_not_the_others(double: Op) -> None:
    explanation = llmcore.explain("double", torch.zeros(30))
    assert explanation.chosen == "reference"
    assert explanation.reasons["cpu"] == ["30 elements: this kernel takes up to 9"]
    assert explanation.reasons["cuda"] == ["torch finds no GPU"]
    assert explanation.reasons["triton"] == ["no Triton kernel: two times is not worth one"]
    assert explanation.reasons["reference"] == explanation.reasons["cpu_avx2"] == []
    text = str(explanation)
    assert text.startswith("double runs on reference")
    assert "  cpu: 30 elements" in text and "  cpu_avx2: could run" in text


def test_explain_follows_use(double: Op) -> None:
    with llmcore.use("cpu_avx2"):
        assert llmcore.explain("double", torch.zeros(3)).chosen == "cpu_avx2"
    with llmcore.use("cuda"), pytest.raises(BackendError, match="torch finds no GPU"):
        llmcore.explain("double", torch.zeros(3))


def test_explain_takes_the_public_function_and_its_options() -> None:
    q = torch.randn(1, 2, 3, 8)
    by_function = llmcore.explain(ops.attention, q, q, q, causal=True, window=(1, 0))
    assert by_function == llmcore.explain("attention", q, q, q, causal=True, window=(1, 0))
    assert by_function.op == "attention"
    assert by_function.chosen in ("cpu", "reference")


@pytest.mark.skipif(native.module is None, reason=native.why_not)
def test_explain_says_which_gradient_is_the_definitions() -> None:
    """Of attention's mask and slopes: a sum over keys is native in float32 only."""

    def chosen(dtype: torch.dtype, **options: torch.Tensor) -> str:
        q = torch.randn(1, 4, 7, 8, dtype=dtype)
        return llmcore.explain(ops.attention, q, q, q, **options).chosen

    of_keys, one_for_all = (torch.randn(s, requires_grad=True) for s in ((7,), (7, 1)))
    slopes = torch.rand(4, requires_grad=True)
    for options in ({"mask": one_for_all}, {"alibi_slopes": slopes}):
        assert chosen(torch.float32, **options) == "cpu"
        assert chosen(torch.bfloat16, **options) == "reference"
        with torch.no_grad():
            assert chosen(torch.bfloat16, **options) == "cpu"
    assert chosen(torch.bfloat16, mask=of_keys) == "cpu"


def test_explain_raises_what_the_call_raises() -> None:
    with pytest.raises(ValueError, match="weight: got shape"):
        llmcore.explain(ops.rms_norm, torch.randn(3, 4), torch.randn(5))
    with pytest.raises(ValueError, match="op: got 'conv', expected one of"):
        llmcore.explain("conv")
    with pytest.raises(ValueError, match="op: got 'relu'"):
        llmcore.explain(torch.relu)


def test_explain_draws_nothing_from_the_generator() -> None:
    q, before = torch.randn(1, 2, 3, 8), torch.get_rng_state()
    llmcore.explain(ops.attention, q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_backends_table() -> None:
    table = llmcore.backends()
    assert set(table) == set(ops.__all__)
    assert table["scaled_dot_product_attention"] == table["attention"]
    for name in REGISTRY:
        row = table[name]
        assert tuple(row) == BACKENDS
        assert row["reference"] == ""
        for backend, why in row.items():
            candidate = REGISTRY[name].candidate(backend)
            assert why == (
                REGISTRY[name].why_absent(backend) if candidate is None else candidate.machine
            )
            assert candidate is not None or len(why) > 10  # a sentence
    text = str(table)
    for name in REGISTRY:
        assert f"\n{name} " in text
    assert "(1) " in text and "runs" in text


def test_explain_a_mapped_op() -> None:
    q = torch.ones(1, 2, 3, 8)
    by_name = llmcore.explain("scaled_dot_product_attention", q, q, q, is_causal=True)
    assert by_name == llmcore.explain(ops.scaled_dot_product_attention, q, q, q)
    assert by_name.op == "attention"
    with pytest.raises(ValueError, match=r"expected one of .*scaled_dot_product_attention"):
        llmcore.explain("scaled_dot_product", q, q, q)


def on_cuda(value: Any) -> Any:
    """A tensor without values that says it is on a GPU, in float16 if it is floating."""
    if not isinstance(value, torch.Tensor):
        return value
    dtype = torch.float16 if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="cuda")


def test_cuda_tensors_choose_triton() -> None:
    """Where Triton's kernels can run and take the call; torch's own product for a plain weight."""
    if why := device.triton_reason():
        pytest.skip(why)
    for name, calls in tiny().items():
        for sample in calls:
            with FakeTensorMode(allow_non_fake_inputs=True):
                args = [on_cuda(a) for a in sample.args]
                options = {key: on_cuda(a) for key, a in sample.options.items()}
                chosen = llmcore.explain(name, *args, **options).chosen
            wanted = "torch" if name == "linear" else "triton"
            assert chosen == wanted, f"{name}, {sample.name}: {chosen}"


def test_backends_that_run_do_run() -> None:
    """What the table says runs can be forced on at least one sample."""
    table = llmcore.backends()
    for name, op in REGISTRY.items():
        row = table[name]
        for backend, why in row.items():
            if why or backend in ("cuda", "triton"):
                continue
            ran = 0
            for sample in op.samples(Draw(0)):
                with llmcore.use(backend):
                    try:
                        op.function(*sample.args, **sample.options)
                        ran += 1
                        break
                    except BackendError:
                        continue
            assert ran, f"{name} on {backend}"


def test_levels_of_this_machine_are_told_from_those_it_lacks() -> None:
    if native.module is None:
        pytest.skip(native.why_not)
    row = llmcore.backends()["rms_norm"]
    assert row["cpu"] == "" and row["cpu_portable"] == ""
    for level, lacks in llmcore.device.cpu_levels().items():
        assert (row[f"cpu_{level}"] == "") == (lacks == "")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_environment_variable_forces() -> None:
    code = (
        "import torch, llmcore; print(llmcore.explain('softmax', torch.randn(2, 3)).chosen);\n"
        "with llmcore.use('reference'): pass\n"
        "print(llmcore.dispatch.forced)"
    )
    done = python(code, LLMCORE_BACKEND="reference")
    assert done.stdout.split() == ["reference", "reference"], done.stderr


def test_environment_variable_with_an_unknown_name() -> None:
    done = python(
        "import torch, llmcore; llmcore.ops.softmax(torch.randn(2))", LLMCORE_BACKEND="gpu"
    )
    assert "ValueError: backend: got 'gpu', expected one of" in done.stderr


def test_import_brings_in_neither_triton_nor_transformers() -> None:
    code = (
        "import sys, llmcore, torch; llmcore.ops.rms_norm(torch.randn(2, 3)); llmcore.backends()\n"
        "print([m for m in ('triton', 'transformers') if m in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_raw_op_without_the_extension_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", "not built: no compiler")
    with pytest.raises(RuntimeError, match="rms_norm_forward: not built: no compiler"):
        native.op("rms_norm_forward")()
    candidates: Any = dispatch.native_candidates("rms_norm", lambda *a: [])
    assert {c.machine for c in candidates} == {"not built: no compiler"}


def test_use_survives_interleaved_blocks() -> None:
    """As two threads would leave them: each takes away its own entry, and nothing sticks."""
    first, second = llmcore.use("reference"), llmcore.use("cpu_portable")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced == "cpu_portable"
    second.__exit__(None, None, None)
    assert dispatch.forced is None


def test_a_cached_call_does_not_let_a_bad_one_through() -> None:
    x = torch.ones(2, 3)
    ops.softmax(x, 1)
    with pytest.raises(TypeError, match="dim"):
        ops.softmax(x, 1.0)
    with pytest.raises((TypeError, ValueError), match="eps"):
        ops.rms_norm(x, None, None)
    with pytest.raises(ValueError, match="eps"):
        ops.rms_norm(x, None, -1.0)


def test_dispatch_backends_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cuda_reason", lambda: "torch finds no GPU")
    assert cli.main(["backends", "rms_norm", "linear"]) == 0
    out = capsys.readouterr().out
    assert all(backend in out for backend in BACKENDS) and "softmax" not in out
    assert "no CUDA tensors: torch finds no GPU" in out
    first = dispatch.order("rms_norm", "cpu")[0]
    assert f"    {', '.join(dispatch.order('rms_norm', 'cpu'))}: rms_norm" in out
    assert REGISTRY["rms_norm"].kernel(None, torch.zeros(2, 3), None, 1e-6).backend == first
    assert cli.main(["backends", "rms_nrm"]) == 2
    assert "ops: got 'rms_nrm', expected one of" in capsys.readouterr().out


def test_dispatch_backends_command_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cuda_reason", lambda: None)
    assert cli.main(["backends", "scaled_dot_product_attention"]) == 0
    assert "CUDA tensors go to the first of these" in capsys.readouterr().out
    with llmcore.use("reference"):
        assert cli.main(["backends"]) == 0
    assert "reference is forced on every call" in capsys.readouterr().out
