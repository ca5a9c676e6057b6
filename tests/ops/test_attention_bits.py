"""A row has the same bits whatever else is computed beside it, and however it is come by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import qkv, same

from llmcore import dispatch, ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("S", [11, 150])
def test_attention_causal_row_equals_decode(S: int, backend: str) -> None:
    q, k, v = qkv(T=S, S=S)
    whole = ops.attention(q, k, v, causal=True)
    for place in (0, 5, S // 2, S - 1):
        row, end = slice(place, place + 1), place + 1
        alone = ops.attention(q[:, :, row], k[:, :, :end], v[:, :, :end])
        same(backend, alone, whole[:, :, row])
        at: Any = {"causal": True, "q_offset": place}
        same(backend, ops.attention(q[:, :, row], k, v, **at), whole[:, :, row])
        offsets: Any = {"causal": True, "q_offset": torch.tensor([place, place])}
        same(backend, ops.attention(q[:, :, row], k, v, **offsets), whole[:, :, row])


@pytest.mark.parametrize(("chunk", "S"), [(1, 11), (2, 11), (4, 11), (7, 11), (64, 150), (33, 150)])
def test_attention_prefill_in_chunks_equals_the_whole(chunk: int, S: int, backend: str) -> None:
    q, k, v = qkv(T=S, S=S)
    whole = ops.attention(q, k, v, causal=True)
    parts = []
    for start in range(0, S, chunk):
        lengths = torch.full((2,), min(start + chunk, S))
        parts.append(
            ops.attention(q[:, :, start : start + chunk], k, v, causal=True, kv_lengths=lengths)
        )
    same(backend, torch.cat(parts, 2), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("T", "padding"), [(6, 3), (70, 1), (70, 64)])
def test_attention_padding_equals_single(side: str, T: int, padding: int, backend: str) -> None:
    q, k, v = qkv(B=1, T=T, S=T)
    alone = ops.attention(q, k, v, causal=True)
    pad = torch.full((1, 4, padding, 16), math.nan)
    seen = torch.ones(1, 1, 1, T + padding, dtype=torch.bool)
    own = slice(0, T) if side == "right" else slice(padding, padding + T)
    seen[..., : own.start] = False
    seen[..., own.stop :] = False

    def padded(t: torch.Tensor) -> torch.Tensor:
        wide = pad[:, : t.shape[1]]
        return torch.cat((t, wide) if side == "right" else (wide, t), 2)

    y = ops.attention(padded(q), padded(k), padded(v), causal=True, mask=seen)
    same(backend, y[:, :, own], alone)


def test_attention_row_does_not_depend_on_its_batch(backend: str) -> None:
    q, k, v = qkv(B=5, T=70, S=70)
    lengths = torch.tensor([70, 3, 33, 64, 65])
    whole = ops.attention(q, k, v, causal=True, kv_lengths=lengths, q_offset=0)
    for row in range(5):
        one = slice(row, row + 1)
        options: Any = {"causal": True, "kv_lengths": lengths[one], "q_offset": 0}
        same(backend, ops.attention(q[one], k[one], v[one], **options), whole[one])
        heads = ops.attention(q[one, 2:], k[one, 1:], v[one, 1:], **options)
        same(backend, heads, whole[one, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 40])
def test_attention_few_queries_equal_many(D: int, dtype: torch.dtype, backend: str) -> None:
    """Keys are packed for all queries, packed for a few or read as they lie: the same bits."""
    q, k, v = (t.to(dtype) for t in qkv(B=1, H=6, G=2, T=70, S=600, D=D))
    v[:, :, 520, 3] = math.nan  # and a hidden one hides in each of them
    seen = torch.arange(600) != 520
    whole = ops.attention(q, k, v, mask=seen)
    assert whole.isfinite().all()
    for start, end in ((0, 1), (7, 9), (10, 19), (40, 70)):
        part = ops.attention(q[:, :, start:end], k, v, mask=seen)
        if backend == "best":
            assert torch.equal(part, whole[:, :, start:end])
    attended = ops.attention(q[:, :, :1], k, v)
    assert attended[..., 3].isnan().all() and attended[..., 4:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_gradient_does_not_depend_on_its_batch(dtype: torch.dtype, backend: str) -> None:
    """A batch goes to threads head by head, one sequence in parts of heads."""
    if backend != "best":
        pytest.skip("the definition's sums are torch's, which promise no order")
    tensors = [t.to(dtype) for t in qkv(B=3, T=50, S=600)]
    cotangent = torch.randn(3, 4, 50, 16).to(dtype)

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        leaves = [t[rows].clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(ops.attention(*leaves, causal=True), leaves, cotangent[rows])

    whole = gradients(slice(0, 3))
    for got, want in zip(gradients(slice(1, 2)), whole, strict=True):
        assert torch.equal(got, want[1:2])


@pytest.mark.parametrize("shape", [(600,), (2, 1, 5, 600), (4, 1, 600), (1, 4, 5, 1)], ids=str)
def test_attention_mask_gradient_does_not_depend_on_threads(
    shape: tuple[int, ...], backend: str
) -> None:
    """Elements are sums over heads, sequences, queries or keys; 600 keys are three tasks."""
    (q, k, v), mask = qkv(T=5, S=600), torch.randn(shape, requires_grad=True)
    slopes, cotangent = torch.rand(4, requires_grad=True), torch.randn(2, 4, 5, 16)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = ops.attention(q, k, v, mask=mask, alibi_slopes=slopes, causal=True)
        return torch.autograd.grad(y, (mask, slopes), cotangent)

    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(gradients())
    with dispatch.use("reference"):
        want = gradients()
    for one, two, close_to in zip(*found, want, strict=True):
        same(backend, one, two)
        torch.testing.assert_close(one, close_to, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_attention_hidden_values_change_no_bit(backend: str, value: float) -> None:
    """Beyond one block of keys too: rows that may not see key 450 are as if it were not there."""
    q, k, v = (torch.randn(1, 1, 600, 64) for _ in range(3))
    poisoned = v.clone()
    poisoned[0, 0, 450] = value
    clean = ops.attention(q, k, v, causal=True)
    found = ops.attention(q, k, poisoned, causal=True)
    same(backend, found[:, :, :450], clean[:, :, :450])
    assert not found[:, :, 450:].isfinite().any()
