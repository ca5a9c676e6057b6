"""attention over keys and values as a cache keeps them: in bfloat16, or in int8 with scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import close, qkv, same

from llmcore import ops
from llmcore.ops.quantize_rows import quantize_rows

pytestmark = pytest.mark.usefixtures("backend")


def cached(k: torch.Tensor, v: torch.Tensor, kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """k and v as a cache keeps them, and the options that go with them."""
    if kind == "bf16":
        return k.bfloat16(), v.bfloat16(), {}
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    return k, v, {"k_scale": k_scale, "v_scale": v_scale}


def widened(k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What they stand for."""
    if not options:
        return k.float(), v.float()
    return k * options["k_scale"][..., None], v * options["v_scale"][..., None]


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("D", [64, 40])
def test_attention_cache_is_what_it_stands_for(kind: str, D: int, backend: str) -> None:
    q, k, v = qkv(B=1, H=6, G=2, T=70, S=600, D=D)
    k, v, scales = cached(k, v, kind)
    wide = widened(k, v, scales)
    for rows in (slice(0, 1), slice(40, 44), slice(0, 70)):
        got = ops.attention(q[:, :, rows], k, v, causal=True, **scales)
        want = ops.attention(q[:, :, rows], *wide, causal=True)
        close(got, want)
        if kind == "bf16" and backend == "best":
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("D", [64, 40])
def test_attention_cache_few_queries_equal_many(kind: str, D: int, backend: str) -> None:
    q, k, v = qkv(B=1, H=6, G=2, T=70, S=600, D=D)
    v[:, :, 520] = math.nan
    seen = torch.arange(600) != 520
    k, v, scales = cached(k, v, kind)
    whole = ops.attention(q, k, v, mask=seen, **scales)
    assert whole.isfinite().all()
    for start, end in ((0, 1), (7, 9), (10, 19), (40, 70)):
        part = ops.attention(q[:, :, start:end], k, v, mask=seen, **scales)
        same(backend, part, whole[:, :, start:end])
    assert ops.attention(q[:, :, :1], k, v, **scales).isnan().all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_compiles(kind: str) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, kind)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v, **scales), ops.attention(q, k, v, **scales))


@pytest.mark.parametrize("T", [1, 40])
def test_attention_cache_scale_that_is_not_finite(T: int) -> None:
    """As NaN or inf in the rows: it spreads to those who attend to it, and to no one else."""
    q, k, v = qkv(T=T, S=200, D=64)
    k, v, scales = cached(k, v, "int8")
    v[:, :, 100, 0], v[:, :, 100, 1] = 3, 0
    for value in (math.nan, math.inf):
        scales["v_scale"][:, :, 100] = value
        y = ops.attention(q, k, v, **scales)
        close(y, ops.attention(q, *widened(k, v, scales)))
        assert not y[..., :2].isfinite().any()
        scales["k_scale"][:, :, 150:] = value
        lengths = torch.tensor([100, 30])
        y = ops.attention(q, k, v, kv_lengths=lengths, **scales)
        close(y, ops.attention(q, *widened(k, v, scales), kv_lengths=lengths))
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_beside_queries_of_another_dtype(dtype: torch.dtype, kind: str) -> None:
    q, k, v = qkv()
    if kind == "bf16" and dtype == torch.bfloat16:
        kind = "int8"
    k, v, scales = cached(k, v, kind)
    y, lse = ops.attention(q.to(dtype), k, v, return_lse=True, **scales)
    exact = ops.attention(q.to(dtype).float(), k, v, **scales)
    assert y.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(y, exact.to(dtype))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_cache_gradient_goes_by_the_definition(kind: str) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, kind)
    leaf = q.clone().requires_grad_()
    (got,) = torch.autograd.grad(ops.attention(leaf, k, v, **scales).square().sum(), leaf)
    y = ops.attention(leaf, *widened(k, v, scales))
    (want,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if scales:
        scale = scales["v_scale"].requires_grad_()
        assert torch.autograd.grad(ops.attention(q, k, v, **scales).sum(), scale)[0].any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("k_scale: expected a tensor", {"k_scale": None}),
        ("v_scale: expected a tensor", {"v_scale": None}),
        ("v_scale: got shape", {"v_scale": torch.ones(2, 2, 10)}),
        ("k_scale: got torch.float16", {"k_scale": torch.ones(2, 2, 11).half()}),
        ("k_scale: on meta", {"k_scale": torch.ones(2, 2, 11, device="meta")}),
        ("v: got torch.float32, expected torch.int8", {"v": torch.randn(2, 2, 11, 16)}),
        ("k: got torch.uint8", {"k": torch.zeros(2, 2, 11, 16, dtype=torch.uint8)}),
        ("k_scale: expected None", {"k": qkv()[1], "v": qkv()[2]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_cache_errors(argument: str, change: dict[str, Any]) -> None:
    q, k, v = qkv()
    k, v, scales = cached(k, v, "int8")
    ops.attention(q, k, v, **scales)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
        ops.attention(**{"q": q, "k": k, "v": v, **scales, **change})
