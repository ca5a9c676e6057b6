"""The KV caches: what they hold, how they make room, and that a failed pass leaves no trace."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from llmcore.models import KVCache, PagedKVCache, TransformerConfig
from llmcore.models.cache_base import KEY_CHUNK
from llmcore.models.kv_buffers import decode, encode

CONFIG = TransformerConfig(
    vocab_size=10,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=4,
    feed_forward=16,
    context_length=100,
)


def growing(config, batch, **options):
    return KVCache(config, batch, capacity=2, **options)


def static(config, batch, **options):
    return KVCache(config, batch, config.context_length, static=True, **options)


def paged(config, batch, **options):
    return PagedKVCache(config, batch, page_length=4, **options)


KINDS = {kind.__name__: kind for kind in (growing, static, paged)}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def append(cache, new, counts=None):
    """One pass that stores random keys and values in both layers; returns them, (2, B, 1, T, 4)."""
    like = torch.zeros(cache.batch, new, CONFIG.width)
    span = cache.reserve(like.shape[1], like, None if counts is None else torch.tensor(counts))
    stored = []
    for layer in range(CONFIG.layers):
        k, v = torch.randn(2, cache.batch, 1, new, 4)
        cache.store(layer, k, v, span)
        stored.append(torch.stack((k, v)))
    cache.commit(span)
    return stored


def held(cache, row):
    """All layers' keys and values of a sequence, each pair (2, 1, n, 4)."""
    buffers = cache.take(row).buffers
    return [torch.stack(pair) for pair in zip(buffers.keys, buffers.values, strict=True)]


def assert_holds(cache, row, parts):
    """`parts`: for each pass what append gave, which of its rows it is, and how many tokens."""
    for layer, found in enumerate(held(cache, row)):
        expected = [stored[layer][:, b, :, :count] for stored, b, count in parts]
        assert torch.equal(found, torch.cat(expected, dim=2))


def test_cache_holds_what_was_stored(make):
    cache = make(CONFIG, 2)
    first, second = append(cache, 3), append(cache, 4)
    for row in range(2):
        assert_holds(cache, row, [(first, row, 3), (second, row, 4)])
    assert len(cache) == 7
    assert cache.lengths.tolist() == [7, 7]


def test_cache_sequences_of_different_length_have_no_holes(make):
    cache = make(CONFIG, 2)
    first = append(cache, 3, counts=[1, 3])
    span = cache.reserve(2, torch.zeros(2, CONFIG.width), None)
    assert span.positions.tolist() == [[1, 2], [3, 4]]
    assert span.kv_lengths.tolist() == [3, 5]
    second = append(cache, 2)
    assert_holds(cache, 0, [(first, 0, 1), (second, 0, 2)])
    assert_holds(cache, 1, [(first, 1, 3), (second, 1, 2)])


def test_cache_grows_by_doubling():
    cache = KVCache(CONFIG, batch=1, capacity=4)
    buffers, old = set(), []
    for _ in range(100):
        append(cache, 1)
        if cache.keys[0].data_ptr() not in buffers:
            buffers.add(cache.keys[0].data_ptr())
            old.append(cache.keys[0])  # kept alive, so that no address is used twice
    assert [buffer.shape[2] for buffer in old] == [4, 8, 16, 32, 64, 100]


def test_cache_static_keeps_its_addresses_and_says_when_it_is_full():
    cache = KVCache(CONFIG, batch=2, capacity=9, static=True)
    first = append(cache, 4)
    addresses = [tensor.data_ptr() for tensor in cache.buffers.tensors()]
    append(cache, 5, counts=[1, 5])
    with pytest.raises(ValueError, match="the cache is full: 10 slots needed, capacity 9"):
        append(cache, 1)
    assert cache.lengths.tolist() == [5, 9]
    cache.truncate([4, 4])
    second = append(cache, 2)
    assert [tensor.data_ptr() for tensor in cache.buffers.tensors()] == addresses
    assert_holds(cache, 1, [(first, 1, 4), (second, 1, 2)])
    with pytest.raises(ValueError, match="11 slots needed, capacity 10"):
        append(KVCache(CONFIG, batch=1, capacity=10, static=True), 11)


def test_cache_failed_pass_leaves_it_as_it_was(make):
    cache = make(CONFIG, 2)
    first = append(cache, 2, counts=[1, 2])
    span = cache.reserve(5, torch.zeros(2, CONFIG.width), None)
    cache.store(0, *torch.randn(2, 2, 1, 5, 4), span)  # and no commit
    assert (len(cache), cache.lengths.tolist()) == (2, [1, 2])
    again = append(cache, 1)
    assert_holds(cache, 0, [(first, 0, 1), (again, 0, 1)])
    assert_holds(cache, 1, [(first, 1, 2), (again, 1, 1)])


@pytest.mark.parametrize("rows", [[1, 2], [2, 1], [0], [1, 1, 0], []], ids=str)
def test_cache_select_keeps_rows_in_order(make, rows):
    cache = make(CONFIG, 3)
    first = append(cache, 6, counts=[1, 6, 2])
    cache.select(torch.tensor(rows, dtype=torch.int64))
    assert (cache.batch, cache.counts) == (len(rows), [[1, 6, 2][row] for row in rows])
    if not rows:
        return
    second = append(cache, 3)  # of its own for each row, also where two were one
    for place, row in enumerate(rows):
        assert_holds(cache, place, [(first, row, [1, 6, 2][row]), (second, place, 3)])


def test_cache_truncate_drops_the_newest(make):
    cache = make(CONFIG, 2)
    first = append(cache, 9)
    cache.truncate(torch.tensor([5, 8]))
    second = append(cache, 2)
    assert cache.counts == [7, 10]
    assert_holds(cache, 0, [(first, 0, 5), (second, 0, 2)])
    assert_holds(cache, 1, [(first, 1, 8), (second, 1, 2)])
    cache.truncate([0, 0])
    third = append(cache, 2)
    assert_holds(cache, 1, [(third, 1, 2)])


@pytest.mark.parametrize("source", KINDS)
def test_cache_put_gives_a_place_to_another_sequence(make, source):
    cache, other = make(CONFIG, 2), KINDS[source](CONFIG, 1)
    first, second = append(cache, 3), append(other, 7)
    cache.put(0, other.take(0))
    third = append(cache, 1)
    assert cache.counts == [8, 4]
    assert_holds(cache, 0, [(second, 0, 7), (third, 0, 1)])
    assert_holds(cache, 1, [(first, 1, 3), (third, 1, 1)])
    empty = make(CONFIG, 2)
    empty.put(1, other.take(0))
    assert_holds(empty, 1, [(second, 0, 7)])


def test_cache_paged_takes_pages_by_need_and_gives_them_back():
    cache = PagedKVCache(CONFIG, batch=2, pages=6, page_length=4)
    append(cache, 9, counts=[3, 9])
    assert cache.pages_in_use == 1 + 3
    append(cache, 4, counts=[1, 3])
    assert cache.pages_in_use == 1 + 3
    assert cache.keys[0].shape == (6, 1, 4, 4)
    with pytest.raises(ValueError, match="the cache is full: all of its 6 pages are in use"):
        append(cache, 9)
    assert cache.counts == [4, 12]
    cache.truncate([0, 5])
    assert cache.pages_in_use == 2
    assert cache.page_table.shape == (2, 2)
    cache.select(torch.tensor([0]))
    assert cache.pages_in_use == 0


def test_cache_paged_sequences_share_what_they_have_in_common():
    """Best-of-N: a page of their own only from the first token that differs."""
    cache = PagedKVCache(CONFIG, batch=1, page_length=4)
    append(cache, 10)
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.pages_in_use == 3
    append(cache, 1)
    assert cache.pages_in_use == 2 + 3
    cache.truncate([3, 11, 11])
    append(cache, 1)
    assert cache.pages_in_use == 2 + 1 + 2  # sequence 0 wrote into the first page: a copy


def test_cache_int8_is_the_nearest_of_255_steps():
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0.0
    x[0, 1] = 1e-43  # so small that the scale is no more than a few of the smallest steps
    stored, scale = encode(x, "int8")
    assert scale.shape == (3, 5) and stored.dtype == torch.int8
    error = (decode(stored, scale, torch.float32) - x).abs()
    assert (error <= scale[..., None] * 0.5001 + 1e-43).all()
    assert stored[1:].abs().amax(dim=-1).eq(127).all()
    x[1, 2, 3], x[2, 2, 3] = float("nan"), float("inf")
    found = decode(*encode(x, "int8"), torch.float32)
    assert found[1, 2].isnan().all() and found[2, 2].isnan().all()
    assert found.isnan().sum() == 2 * 64


def logits_of(model, ids, cache, chunks):
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)


def random_ids(*shape):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_cache_stored_rounded_stays_close(make, tiny_decoder, dtype):
    model, ids = tiny_decoder(), random_ids(2, 30)
    with torch.no_grad():
        expected = model(ids)
    cache = make(model.config, 2, dtype=dtype)
    logits = logits_of(model, ids, cache, 7)
    spread = (logits - expected).std() / expected.std()
    assert 0 < spread < {"bf16": 0.02, "int8": 0.05}[dtype]
    assert {tensor.dtype for tensor in cache.keys} == {
        {"bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    }
    assert [t.dtype for t in cache.buffers.key_scales] == [torch.float32] * 3 * (dtype == "int8")


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_cache_kinds_give_the_same_bits(native_kernels, tiny_decoder, dtype):
    """In one pass or many, in place or in pages, with other sequences beside it or not."""
    model = tiny_decoder(context_length=800)
    ids = random_ids(1, 620)
    expected = logits_of(model, ids, static(model.config, 1, dtype=dtype), 620)
    if dtype is None:
        with torch.no_grad():
            assert torch.equal(expected, model(ids))
    for kind in KINDS.values():
        assert torch.equal(
            logits_of(model, ids, kind(model.config, 1, dtype=dtype), [300, 1, 200, 7, 112]),
            expected,
        )
    for kind in KINDS.values():
        cache = kind(model.config, 2, dtype=dtype)
        mask = torch.tensor([[True] * 90, [False] * 50 + [True] * 40])
        with torch.no_grad():
            model(random_ids(2, 90), cache, mask)
        cache.truncate([0, 40])
        found = logits_of(model, ids.expand(2, -1), cache, [400, 220])[:1]
        assert torch.equal(found, expected)


def test_cache_window_sees_the_last_tokens_only(tiny_decoder):
    """One layer with a window of 5: the logits are those of the last 5 tokens at their places."""
    model = tiny_decoder(layers=1, window=5)
    wide = tiny_decoder(layers=1)
    ids = random_ids(1, 20)
    with torch.no_grad():
        logits, all_seen = model(ids)[0], wide(ids)[0]
        torch.testing.assert_close(logits[:5], all_seen[:5])
        assert (logits[5:] - all_seen[5:]).abs().amax(dim=1).min() > 1e-3
        # rope only knows distances: 5 tokens at positions 0 to 4 see what they see further on
        for end in range(5, 21):
            last = wide(ids[:, end - 5 : end])[0, -1]
            torch.testing.assert_close(logits[end - 1], last, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 100, 512, 700])
def test_cache_window_forgets_without_a_trace(native_kernels, tiny_decoder, window):
    """The bits of a pass over everything, from a cache that holds a few chunks."""
    model = tiny_decoder(context_length=3000, layers=2, window=window)
    ids = random_ids(1, 2100)
    with torch.no_grad():
        expected = model(ids)
    chunks = [100, 512, 512, 1, 1, 510, 3, 461]
    for dtype in (None, "bf16"):
        kept = logits_of(model, ids, static(model.config, 1, dtype=dtype), 2100)
        assert dtype or torch.equal(kept, expected)
        for cache in (
            KVCache(model.config, 1, 64, dtype=dtype),
            KVCache(model.config, 1, window + 2 * KEY_CHUNK, dtype=dtype, static=True),
            PagedKVCache(model.config, 1, page_length=64, dtype=dtype),
        ):
            assert torch.equal(logits_of(model, ids, cache, chunks), kept)
            assert cache.counts == [2100]
            pages = isinstance(cache, PagedKVCache)
            slots = 64 * cache.pages_in_use if pages else cache.capacity
            assert slots <= 2 * (window + 2 * KEY_CHUNK)


def test_cache_window_forgets_in_each_sequence_what_that_can_spare(native_kernels, tiny_decoder):
    model = tiny_decoder(context_length=3000, layers=2, window=50)
    ids = random_ids(2, 1400)
    with torch.no_grad():
        expected = [model(ids[:1]), model(ids[1:, :300])]
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 50:] = False
    for cache in (KVCache(model.config, 2, 64), PagedKVCache(model.config, 2)):
        with torch.no_grad():
            for step in range(6):
                part = torch.zeros(2, 200, dtype=torch.int64)
                part[0] = ids[0, 200 * step : 200 * (step + 1)]
                part[1, :50] = ids[1, 50 * step : 50 * (step + 1)]
                logits = model(part, cache, mask)
                assert torch.equal(logits[0], expected[0][0, 200 * step : 200 * (step + 1)])
                assert torch.equal(logits[1, :50], expected[1][0, 50 * step : 50 * (step + 1)])
        assert cache.counts == [1200, 300]
        assert cache.take(0).first >= KEY_CHUNK and cache.take(1).first == 0
        # what was forgotten comes along, and goes with the row
        cache.put(1, cache.take(0))
        cache.select(torch.tensor([1]))
        with torch.no_grad():
            assert torch.equal(model(ids[:1, 1200:], cache), expected[0][:, 1200:])
        with pytest.raises(ValueError, match=r"has forgotten \d+ tokens of sequence 0"):
            cache.truncate([100])
        cache.truncate([1150])
        with torch.no_grad():
            assert torch.equal(model(ids[:1, 1150:], cache), expected[0][:, 1150:])
        cache.truncate([0])
        with torch.no_grad():
            assert torch.equal(model(ids[:1, :20], cache), expected[0][:, :20])


def test_cache_key_chunk_is_the_kernels():
    header = Path(__file__).parents[2] / "csrc/cpu/attention_keys.h"
    text = header.read_text(encoding="utf-8")
    block = re.search(r"KEY_BLOCK = (\d+);", text)
    assert block and "KEY_CHUNK = 2 * KEY_BLOCK;" in text
    assert 2 * int(block[1]) == KEY_CHUNK


def test_cache_refuses(make):
    cache = make(CONFIG, 1)
    append(cache, 90)
    with pytest.raises(ValueError, match=r"90 tokens in the cache and 11 new ones exceed .* 100"):
        append(cache, 11)
    with pytest.raises(ValueError, match="holds 1 sequences, got ids of 2"):
        cache.reserve(1, torch.zeros(2, 8), None)
    with pytest.raises(ValueError, match="lengths: expected 1 numbers, got 2"):
        cache.truncate([1, 1])
    for length in (-1, 91):
        with pytest.raises(ValueError, match=f"lengths: sequence 0 has 90 tokens, got {length}"):
            cache.truncate([length])
    other = make(dataclasses.replace(CONFIG, layers=3), 1)
    append(other, 2)
    with pytest.raises(ValueError, match=r"kept: \d layers of torch.float32 don't fit"):
        other.put(0, cache.take(0))
    rounded = make(CONFIG, 1, dtype="int8")
    with pytest.raises(ValueError, match=r"2 layers of torch\.int8"):
        rounded.put(0, cache.take(0))
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        make(CONFIG, 0)
    with pytest.raises(ValueError, match=r"dtype must be None or one of 'bf16', 'int8', got 'x'"):
        make(CONFIG, 1, dtype="x")


def test_cache_refuses_sizes():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KVCache(CONFIG, batch=1, capacity=0)
    with pytest.raises(ValueError, match="pages must be at least 1, got 0"):
        PagedKVCache(CONFIG, batch=1, pages=0)
    with pytest.raises(ValueError, match="page_length must be at least 1, got 0"):
        PagedKVCache(CONFIG, batch=1, page_length=0)
