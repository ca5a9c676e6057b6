"""The decoder against transformers' own models, and its laws: causal, cached, padded, trainable."""

import copy

import pytest
import torch

import llmcore
from llmcore.models import KVCache
from llmcore.models.convert import to_theirs, to_transformers
from llmcore.models.families import HUGGING_FACE_LLAMA

transformers = pytest.importorskip("transformers")

LLAMA_SHAPES = {
    "grouped": {},
    "multi_head": {"kv_heads": 4},
    "untied": {"tied_embeddings": False},
    "bias": {"bias": True},
    "wide_heads": {"head_width": 12, "rope_theta": 500.0, "norm_eps": 1e-3},
}


def random_ids(*shape, vocab=300, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request, tiny_decoder, gpt2_shape):
    return tiny_decoder(**(gpt2_shape if request.param == "gpt2" else {}))


@pytest.mark.parametrize("shape", LLAMA_SHAPES)
def test_decoder_matches_transformers_llama(tiny_decoder, shape):
    model = tiny_decoder(**LLAMA_SHAPES[shape])
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = to_transformers(model)(ids).logits
        logits = model(ids)
    assert expected.std() > 1  # the comparison below means something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_decoder_gradients_match_transformers(tiny_decoder):
    model = tiny_decoder(tied_embeddings=False)
    stock = to_transformers(model)
    ids, target = random_ids(2, 12), random_ids(2, 12, seed=1)
    for logits in (model(ids), stock(ids).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    grads = copy.deepcopy(model)
    grads.load_state_dict({name: p.grad for name, p in model.named_parameters()})
    found = to_theirs(grads, HUGGING_FACE_LLAMA)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunks", [[1] * 20, [13, 7], [5, 1, 1, 9, 1, 3]])
def test_decoder_cached_is_uncached(decoder, chunks):
    ids = random_ids(2, 20)
    cache = KVCache(decoder.config, batch=2, capacity=2)
    with torch.no_grad():
        expected = decoder(ids)
        logits = torch.cat([decoder(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 1, 0]],
    "holes": [[0, 1, 0, 1, 1, 0, 1], [1] * 7, [1, 0, 1, 0, 1, 0, 1]],
}


@pytest.mark.parametrize("side", MASKS)
def test_decoder_padded_batch_is_single(decoder, side):
    ids, mask = random_ids(3, 7), torch.tensor(MASKS[side], dtype=torch.bool)
    more = random_ids(3, 4, seed=1)
    cache = KVCache(decoder.config, batch=3, capacity=4)
    with torch.no_grad():
        batch = decoder(ids, cache, mask)
        last = decoder(ids, attention_mask=mask, last_only=True)
        steps = torch.cat([decoder(more[:, t : t + 1], cache) for t in range(4)], dim=1)
        for b in range(3):
            row = torch.cat((ids[b, mask[b]], more[b]))[None]
            expected = decoder(row)[0]
            torch.testing.assert_close(batch[b, mask[b]], expected[:-4], atol=1e-4, rtol=0)
            torch.testing.assert_close(last[b, 0], expected[-5], atol=1e-4, rtol=0)
            torch.testing.assert_close(steps[b], expected[-4:], atol=1e-4, rtol=0)


def test_decoder_padding_is_never_read(decoder):
    ids, mask = random_ids(3, 7), torch.tensor(MASKS["left"])
    other = torch.where(mask.bool(), ids, 299 - ids)
    with torch.no_grad():
        first, second = (decoder(x, attention_mask=mask)[mask.bool()] for x in (ids, other))
    assert torch.equal(first, second)


def test_decoder_padded_chunks_in_the_cache(decoder):
    """A conversation that goes on: each new chunk is padded in its own way."""
    ids = random_ids(2, 8)
    masks = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    cache = KVCache(decoder.config, batch=2, capacity=2)
    with torch.no_grad():
        decoder(ids[:, :4], cache, masks[0])
        logits = decoder(ids[:, 4:], cache, masks[1], last_only=True)
        for b in range(2):
            row = ids[b, torch.cat(masks, dim=1)[b].bool()][None]
            torch.testing.assert_close(logits[b, 0], decoder(row)[0, -1], atol=1e-4, rtol=0)
    assert cache.lengths.tolist() == [6, 5]


def test_decoder_learned_positions_with_padding_at_the_context_end(tiny_decoder, gpt2_shape):
    model = tiny_decoder(**gpt2_shape, context_length=8)
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[0, :5] = False
    cache = KVCache(model.config, batch=2, capacity=2)
    with torch.no_grad():
        model(ids[:, :7], cache, mask[:, :7])
        last = model(ids[:, 7:], cache)
        torch.testing.assert_close(last[0], model(ids[:1, 5:])[0, -1:], atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="8 tokens in the cache and 1 new ones exceed"):
            model(ids[:, :1], cache)


def test_decoder_is_causal(decoder):
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = 299 - changed[0, 7]
    with torch.no_grad():
        before, after = decoder(ids)[0], decoder(changed)[0]
    torch.testing.assert_close(before[:7], after[:7], atol=1e-5, rtol=0)
    assert ((before[7:] - after[7:]).abs().amax(dim=1) > 1e-2).all()


def test_decoder_is_a_plain_module(decoder):
    twin = copy.deepcopy(decoder).train()
    assert twin.state_dict().keys() == decoder.state_dict().keys()
    ids = random_ids(4, 10)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        logits = twin(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in twin.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        assert not torch.equal(twin(ids), decoder(ids))
        twin.load_state_dict(decoder.state_dict())
        assert torch.equal(twin(ids), decoder(ids))


def test_decoder_learns_alike_with_kernels_and_definitions(decoder):
    """20 steps on one batch: the loss curves of this machine's kernels and of plain PyTorch."""
    ids = random_ids(4, 16)

    def curve(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(20):
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    kernels = list(curve(copy.deepcopy(decoder)))
    with llmcore.use("reference"):
        definitions = list(curve(copy.deepcopy(decoder)))
    assert definitions[-1] < definitions[0] - 0.5
    assert kernels == pytest.approx(definitions, rel=1e-3)


def test_decoder_compiles_whole(decoder):
    """One graph, forward and backward, with and without padding (aot_eager needs no compiler)."""
    ids, mask = random_ids(3, 7), torch.tensor(MASKS["left"], dtype=torch.bool)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    for keep in (None, mask):
        grads = []
        for model in (decoder, compiled):
            decoder.zero_grad()
            logits = model(ids, attention_mask=keep)
            logits.square().mean().backward()
            grads.append((logits.detach(), decoder.blocks[0].attention.qkv.weight.grad.clone()))
        torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decoder_in_other_dtypes(decoder, dtype):
    ids, mask = random_ids(3, 7), torch.tensor(MASKS["left"], dtype=torch.bool)
    other = copy.deepcopy(decoder).to(dtype)
    cache = KVCache(other.config, batch=3, capacity=4)
    with torch.no_grad():
        expected = decoder(ids, attention_mask=mask)[mask]
        logits = other(ids, cache, mask)[mask]
        other(ids[:, :1], cache)
    assert logits.dtype == cache.keys[0].dtype == dtype
    spread = (logits.double() - expected).abs().max() / expected.std()
    assert spread < 100 * max(torch.finfo(dtype).eps, 1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_resize_vocab(tiny_decoder, tied):
    model = tiny_decoder(tied_embeddings=tied)
    ids = random_ids(1, 5)
    with torch.no_grad():
        before = model(ids)
        model.resize_vocab(310)
        after = model(ids)
    assert after.shape == (1, 5, 310) and model.config.vocab_size == 310
    torch.testing.assert_close(after[..., :300], before)
    torch.testing.assert_close(after[..., 305], before.mean(dim=-1))
    assert (model.head is None) == tied
    model(torch.tensor([[309]])).sum().backward()
    assert model.embedding.weight.grad[309].abs().max() > 0
    with pytest.raises(ValueError, match="310 tokens and can't shrink to 5"):
        model.resize_vocab(5)


def test_decoder_initial_loss_is_that_of_guessing(tiny_decoder, gpt2_shape):
    model = tiny_decoder(**gpt2_shape)
    torch.manual_seed(0)
    model.reset_parameters()
    ids = random_ids(8, 40)
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), random_ids(320, seed=1))
    assert abs(loss.item() - torch.tensor(300.0).log()) < 0.05


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), None, r"ids must be whole numbers \(B, T\).*\(5,\)"),
        (torch.zeros(1, 5), None, "got torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "T at least 1"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 4), r"shape of ids \(1, 5\)"),
        (torch.zeros(1, 65, dtype=torch.int64), None, "65 tokens exceed the context of 64"),
    ],
)
def test_decoder_refuses(tiny_decoder, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder()(ids, attention_mask=mask)
