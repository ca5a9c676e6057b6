from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmcore import ops
from llmcore.ops.quantize_rows import quantize_rows

pytestmark = pytest.mark.usefixtures("backend")


def paged(k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, size: int) -> Any:
    """k and v (B, G, S, D) cut into pages in random places, all other places NaN."""
    batch, groups, keys, _ = k.shape
    columns = -(-keys // size)
    order = torch.randperm(batch * columns + 3)
    table = torch.full((batch, columns), -1, dtype=torch.int32)
    pages = [t.new_full((len(order), groups, size, t.shape[-1]), math.nan) for t in (k, v)]
    for row, length in enumerate(lengths.tolist()):
        for column in range(-(-length // size)):
            page = table[row, column] = order[row * columns + column]
            last = min((column + 1) * size, length)
            for to, source in zip(pages, (k, v), strict=True):
                piece = source[row, :, column * size : last]
                to[page, :, : piece.shape[1]] = piece
    return pages[0], pages[1], table


@pytest.mark.parametrize("size", [1, 4, 5, 16])
@pytest.mark.parametrize("T", [1, 4], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (3, 0), "softcap": 4.0, "scale": 0.3},
        {"causal": True, "q_offset": 2},
    ],
    ids=str,
)
def test_paged_attention_equals_attention(size: int, T: int, options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 4, T, 16), torch.randn(3, 2, 13, 16), torch.randn(3, 2, 13, 8)
    lengths = torch.tensor([13, 6, 4])
    pages_k, pages_v, table = paged(k, v, lengths, size)
    got = ops.paged_attention(q, pages_k, pages_v, table, lengths, return_lse=True, **options)
    want = ops.attention(q, k, v, kv_lengths=lengths, return_lse=True, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 8, 60])
def test_paged_attention_gives_the_bits_of_attention(
    T: int, dtype: torch.dtype, backend: str
) -> None:
    if backend != "best":
        pytest.skip("the definition's sums are torch's, which promise no order")
    q, k, v = (torch.randn(2, h, n, 64).to(dtype) for h, n in ((4, T), (2, 600), (2, 600)))
    lengths = torch.tensor([600, 259])
    pages_k, pages_v, table = paged(k, v, lengths, 16)
    got = ops.paged_attention(q, pages_k, pages_v, table, lengths, causal=True)
    assert torch.equal(got, ops.attention(q, k, v, kv_lengths=lengths, causal=True))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("T", [1, 60])
def test_paged_attention_of_a_cache_gives_the_bits_of_attention(
    T: int, kind: str, backend: str
) -> None:
    q, k, v = (torch.randn(2, h, n, 64) for h, n in ((4, T), (2, 600), (2, 600)))
    lengths = torch.tensor([600, 259])
    scales, page_scales = {}, {}
    if kind == "bf16":
        k, v = k.bfloat16(), v.bfloat16()
        pages_k, pages_v, table = paged(k, v, lengths, 16)
    else:
        pages_k, pages_v, table = paged(k, v, lengths, 16)
        (k, scales["k_scale"]), (v, scales["v_scale"]) = quantize_rows(k), quantize_rows(v)
        pages_k, page_scales["k_scale"] = quantize_rows(pages_k)
        pages_v, page_scales["v_scale"] = quantize_rows(pages_v)
    got = ops.paged_attention(q, pages_k, pages_v, table, lengths, causal=True, **page_scales)
    want = ops.attention(q, k, v, kv_lengths=lengths, causal=True, **scales)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if backend == "best":
        assert torch.equal(got, want)


def test_paged_attention_sinks_and_alibi() -> None:
    q, k, v = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    lengths = torch.tensor([9, 5])
    options: Any = {"sinks": torch.randn(4), "alibi_slopes": torch.rand(2, 4), "causal": True}
    pages_k, pages_v, table = paged(k, v, lengths, 4)
    got = ops.paged_attention(q, pages_k, pages_v, table, lengths, **options)
    want = ops.attention(q, k, v, kv_lengths=lengths, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_paged_attention_gradient_goes_to_the_pages() -> None:
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)
    lengths = torch.tensor([6, 3])
    pages_k, pages_v, table = paged(k, v, lengths, 2)
    leaves: Any = [t.requires_grad_() for t in (q, pages_k, pages_v)]
    y = ops.paged_attention(q, pages_k, pages_v, table, lengths, causal=True)
    cotangent = torch.randn(y.shape)
    dq, dk, dv = torch.autograd.grad(y, leaves, cotangent)
    plain: Any = [t.requires_grad_() for t in (q.detach().clone(), k, v)]
    want = torch.autograd.grad(
        ops.attention(*plain, kv_lengths=lengths, causal=True), plain, cotangent
    )
    torch.testing.assert_close(dq, want[0], rtol=1e-4, atol=1e-5)
    for got, whole in ((dk, want[1]), (dv, want[2])):
        for row, length in enumerate(lengths.tolist()):
            used = table[row, : -(-length // 2)].long()
            gathered = got[used].transpose(0, 1).flatten(1, 2)[:, :length]
            torch.testing.assert_close(gathered, whole[row, :, :length], rtol=1e-4, atol=1e-5)


def test_paged_attention_pages_may_be_shared() -> None:
    """Two sequences with one prefix keep it once."""
    pages_k, pages_v = torch.randn(4, 1, 4, 8), torch.randn(4, 1, 4, 8)
    table, lengths = torch.tensor([[2, 0], [2, 3]]), torch.tensor([8, 8])
    q = torch.randn(1, 2, 1, 8).expand(2, 2, 1, 8)
    y = ops.paged_attention(q, pages_k, pages_v, table, lengths)
    for row in range(2):
        k, v = (p[table[row]].transpose(0, 1).flatten(1, 2)[None] for p in (pages_k, pages_v))
        torch.testing.assert_close(y[row : row + 1], ops.attention(q[:1], k, v))


def test_paged_attention_length_0_is_zero() -> None:
    q, pages = torch.randn(2, 2, 1, 8), torch.randn(3, 1, 4, 8)
    table, lengths = torch.tensor([[-1], [1]]), torch.tensor([0, 2])
    y, lse = ops.paged_attention(q, pages, pages, table, lengths, return_lse=True)
    assert not y[0].any() and y[1].all()
    assert (lse[0] == -math.inf).all() and lse[1].isfinite().all()


def test_paged_attention_a_page_in_use_must_exist() -> None:
    q, pages = torch.randn(1, 2, 1, 8), torch.randn(3, 1, 4, 8)
    with pytest.raises(IndexError):
        ops.paged_attention(q, pages, pages, torch.tensor([[0, 3]]), torch.tensor([5]))
    ops.paged_attention(q, pages, pages, torch.tensor([[0, 3]]), torch.tensor([4]))


INT8_PAGES = torch.zeros(6, 2, 4, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q: got shape", {"q": torch.randn(2, 4, 8)}),
        ("k_pages: got shape", {"k_pages": torch.randn(6, 2, 4, 7)}),
        ("k_pages: got 3 key/value heads", {"k_pages": torch.randn(6, 3, 4, 8)}),
        ("k_pages: got shape", {"k_pages": torch.randn(6, 2, 0, 8)}),
        ("v_pages: got shape", {"v_pages": torch.randn(5, 2, 4, 8)}),
        ("v_pages: got torch.float16", {"v_pages": torch.randn(6, 2, 4, 8).half()}),
        ("v_scale: expected None", {"v_scale": torch.ones(6, 2, 4)}),
        ("k_scale: expected a tensor", {n: INT8_PAGES for n in ("k_pages", "v_pages")}),
        ("page_table: got shape", {"page_table": torch.zeros(3, 2, dtype=torch.int32)}),
        ("page_table: got torch.float32", {"page_table": torch.zeros(2, 2)}),
        ("page_table: expected a tensor", {"page_table": [[0, 1], [2, 3]]}),
        ("kv_lengths: got shape", {"kv_lengths": torch.tensor([1])}),
        ("kv_lengths: expected a tensor", {"kv_lengths": None}),
        ("sinks: got shape", {"sinks": torch.randn(3)}),
        ("window: got", {"window": (-1, 0)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_paged_attention_errors(argument: str, change: dict[str, Any]) -> None:
    call: dict[str, Any] = {
        "q": torch.randn(2, 4, 1, 8),
        "k_pages": torch.randn(6, 2, 4, 8),
        "v_pages": torch.randn(6, 2, 4, 8),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "kv_lengths": torch.tensor([3, 5]),
    }
    ops.paged_attention(**call)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
        ops.paged_attention(**{**call, **change})
