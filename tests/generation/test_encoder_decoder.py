"""Targets of source texts: the one generation path, the source's keys and values made once."""

import pytest
import torch

from llmcore.generate import best_of, generate, stream
from llmcore.models import Encoder, EncoderDecoder, KVCache, PagedKVCache
from llmcore.models.convert import to_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "2017": {
        "norm": "layer_norm",
        "norm_placement": "post",
        "activation": "relu",
        "positions": "sinusoidal",
        "bias": True,
        "embedding_scale": 32**0.5,
    },
    "t5": {"activation": "geglu", "positions": "relative", "attention_scale": 1.0},
    "rope": {},
}


@pytest.fixture(params=SHAPES)
def model(request, tiny_model):
    return tiny_model(EncoderDecoder, start_id=0, std=0.2, **SHAPES[request.param])


def sources():
    ids = torch.randint(2, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 5:] = mask[3, 2:] = False
    return ids, mask


@torch.no_grad()
def plain_greedy(model, ids, count):
    """No cache, no batch: the definition."""
    target = torch.tensor([[model.config.start_id]])
    for _ in range(count):
        target = torch.cat((target, model(ids, target)[:, -1:].argmax(dim=-1)), dim=1)
    return target[0].tolist()


@torch.no_grad()
@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_encoder_decoder_cached_is_uncached(model, kind):
    if kind is PagedKVCache and model.config.positions == "relative":
        pytest.skip("relative positions: no paged cache")
    ids, mask = sources()
    target = torch.randint(2, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    cache = kind(model.config, 4)
    cache.source = model.read(ids, mask)
    parts = [model.decoder(part, cache) for part in target.split([5, 1, 1, 5], dim=1)]
    whole = model(ids, target, mask)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    for b in range(4):
        alone = model(ids[b : b + 1, mask[b]], target[b : b + 1])
        assert torch.equal(alone[0], whole[b])
    left = torch.cat((ids[3:, 2:], ids[3:, :2]), dim=1)
    assert torch.equal(model(left, target[3:], mask[3:].flip(1)), whole[3:])


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("setup", [{}, {"batch_size": 2}, {"batch_size": 1}, {"draft": "lookup"}])
def test_encoder_decoder_generates_the_plain_tokens(model, setup):
    ids, mask = sources()
    found = generate(model, ids, attention_mask=mask, max_new_tokens=8, stop=(), **setup)
    for b in range(4):
        assert found[b].tolist() == plain_greedy(model, ids[b : b + 1, mask[b]], 8)


def test_encoder_decoder_rows_that_end_leave(model):
    """Stops at different lengths: a source goes on with its own sequence."""
    ids, mask = sources()
    free = generate(model, ids, attention_mask=mask, max_new_tokens=8, stop=())
    ends = [int(free[1, 2]), int(free[2, 5])]
    found = generate(model, ids, attention_mask=mask, max_new_tokens=8, stop=ends, batch_size=3)
    for row, tokens in zip(free.tolist(), found.tolist(), strict=True):
        length = next((i + 1 for i, t in enumerate(row) if i and t in ends), len(row))
        assert tokens[:length] == row[:length]


def test_encoder_decoder_seeds_are_the_sequences_own(model):
    ids, mask = sources()
    options = {"max_new_tokens": 6, "temperature": 1.0, "stop": ()}
    batch = generate(model, ids, attention_mask=mask, seed=[5, 6, 7, 8], **options)
    alone = generate(model, ids[1:2, :5], seed=6, **options)
    assert batch[1].tolist() == alone[0].tolist()
    assert len(set(map(tuple, batch.tolist()))) > 1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", ["marian", "t5"])
def test_encoder_decoder_beams_are_those_of_transformers(tiny_model, shape, beams):
    pytest.importorskip("transformers")
    from model_shapes import FAMILIES

    kind, changes = FAMILIES[shape]
    model = tiny_model(kind, std=0.2, **changes)
    stock = to_transformers(model)
    ids, mask = sources()
    options = {"max_new_tokens": 8, "num_beams": beams, "length_penalty": 1.0}
    ours = generate(model, ids, attention_mask=mask, stop=(9, 17), **options)
    theirs = stock.generate(
        ids,
        attention_mask=mask.long(),
        eos_token_id=[9, 17],
        pad_token_id=1,
        do_sample=False,
        **options,
    )
    assert ours[:, : theirs.shape[1]].tolist() == theirs.tolist()


def test_encoder_decoder_reads_texts(tiny_model, tiny_tokenizer):
    model = tiny_model(EncoderDecoder, start_id=0, std=0.2, vocab_size=266)
    ids = [*tiny_tokenizer.encode("the hi"), 1]
    expected = generate(model, [ids], max_new_tokens=6, stop=())[0]
    options = {"max_new_tokens": 6, "stop": (), "tokenizer": tiny_tokenizer}
    assert generate(model, "the hi", **options) == tiny_tokenizer.decode(expected[1:])
    text = "".join(stream(model, "the hi", tiny_tokenizer, max_new_tokens=6, stop=()))
    assert text == generate(model, "the hi", **options)
    answers = best_of(model, "the hi", 3, seed=1, **options).answers
    assert len(answers) == 3


@pytest.mark.parametrize(
    ("changes", "ids", "options", "message"),
    [
        ({"start_id": None}, [[2]], {}, "config.start_id, which every target begins with, is None"),
        ({}, [[]], {}, "source 0 is without any token"),
        ({}, [[300]], {}, "ids must be from 0 to 299, got 300"),
        ({}, [[2] * 65], {}, "source 0 has 65 tokens, more than the context of 64"),
        ({}, [[2]], {"max_new_tokens": 64}, "1 tokens and 64 new ones exceed"),
        ({"positions": "relative"}, [[2]], {"paged": True}, "take a KVCache"),
    ],
)
def test_encoder_decoder_refuses(tiny_model, changes, ids, options, message):
    model = tiny_model(EncoderDecoder, **{"start_id": 0, **changes})
    with pytest.raises(ValueError, match=message):
        generate(model, ids, **{"max_new_tokens": 3, **options})


def test_encoder_does_not_generate(tiny_model):
    with pytest.raises(TypeError, match="an Encoder doesn't generate"):
        generate(tiny_model(Encoder), [[2]], max_new_tokens=3)


def test_decoder_with_cross_attention_needs_a_source(tiny_model):
    model = tiny_model(EncoderDecoder, start_id=0)
    with pytest.raises(ValueError, match="needs a source, got None"):
        model.decoder(torch.tensor([[2]]))
