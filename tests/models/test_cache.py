"""The KV cache: what it holds, how it grows, and that a failed pass leaves no trace."""

import pytest
import torch

from llmcore.models import KVCache, TransformerConfig

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


def append(cache, new, counts=None):
    """One pass that stores random keys and values in both layers; returns them and the views."""
    like = torch.zeros(cache.batch, new, CONFIG.width)
    span = cache.reserve(like, None if counts is None else torch.tensor(counts))
    stored = []
    for layer in range(CONFIG.layers):
        k, v = torch.randn(2, cache.batch, 1, new, 4)
        stored.append((k, v, *cache.store(layer, k, v, span)))
    cache.commit(span)
    return span, stored


def test_cache_holds_what_was_stored():
    cache = KVCache(CONFIG, batch=2, capacity=3)
    first, second = append(cache, 3)[1], append(cache, 4)[1]
    for (k1, v1, _, _), (k2, v2, keys, values) in zip(first, second, strict=True):
        assert torch.equal(keys, torch.cat((k1, k2), dim=2))
        assert torch.equal(values, torch.cat((v1, v2), dim=2))
    assert len(cache) == 7
    assert cache.lengths.tolist() == [7, 7]


def test_cache_sequences_of_different_length_have_no_holes():
    cache = KVCache(CONFIG, batch=2, capacity=3)
    (_, first), (span, second) = append(cache, 3, counts=[1, 3]), append(cache, 2)
    assert span.positions.tolist() == [[1, 2], [3, 4]]
    assert span.kv_lengths.tolist() == [3, 5]
    for (k1, _, _, _), (k2, _, keys, _) in zip(first, second, strict=True):
        assert torch.equal(keys[0, :, :3], torch.cat((k1[0, :, :1], k2[0]), dim=1))
        assert torch.equal(keys[1], torch.cat((k1[1], k2[1]), dim=1))


def test_cache_grows_by_doubling():
    cache = KVCache(CONFIG, batch=1, capacity=4)
    buffers, old = set(), []
    for _ in range(100):
        append(cache, 1)
        if cache.keys[0].data_ptr() not in buffers:
            buffers.add(cache.keys[0].data_ptr())
            old.append(cache.keys[0])  # kept alive, so that no address is used twice
    assert [buffer.shape[2] for buffer in old] == [4, 8, 16, 32, 64, 100]


def test_cache_failed_pass_leaves_it_as_it_was():
    cache = KVCache(CONFIG, batch=2, capacity=2)
    first = append(cache, 2, counts=[1, 2])[1]
    span = cache.reserve(torch.zeros(2, 5, CONFIG.width), None)
    cache.store(0, *torch.randn(2, 2, 1, 5, 4), span)  # and no commit
    assert (len(cache), cache.lengths.tolist()) == (2, [1, 2])
    _, again = append(cache, 1)
    for (k1, _, _, _), (k2, _, keys, _) in zip(first, again, strict=True):
        assert torch.equal(keys[0, :, :2], torch.cat((k1[0, :, :1], k2[0]), dim=1))
        assert torch.equal(keys[1], torch.cat((k1[1], k2[1]), dim=1))


def test_cache_select_keeps_rows_in_order():
    cache = KVCache(CONFIG, batch=3, capacity=4)
    stored = append(cache, 3, counts=[1, 2, 2])[1]
    cache.select(torch.tensor([2, 1]))
    assert (cache.batch, len(cache), cache.lengths.tolist()) == (2, 2, [2, 2])
    span, second = append(cache, 1)
    assert span.kv_lengths is None  # equal lengths: the plain way again
    assert torch.equal(second[0][2][:, :, :2], stored[0][0][[2, 1], :, :2])


def test_cache_refuses():
    cache = KVCache(CONFIG, batch=1, capacity=8)
    append(cache, 90)
    with pytest.raises(ValueError, match=r"90 tokens in the cache and 11 new ones exceed .* 100"):
        append(cache, 11)
    with pytest.raises(ValueError, match="holds 1 sequences, got ids of 2"):
        cache.reserve(torch.zeros(2, 1, 8), None)
    with pytest.raises(ValueError, match="batch and capacity must be at least 1, got 0 and 256"):
        KVCache(CONFIG, batch=0)
