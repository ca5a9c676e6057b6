"""Generation: greedy is argmax, cached is uncached, batched is single, sampling is what it says."""

import math

import pytest
import torch

from llmcore.generate import generate, stream
from llmcore.generation.sampling import Sampler, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_greedy(model, ids, count):
    """No cache, no batch: the definition."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def random_ids(*shape, seed=0):
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_decoder, gpt2_shape):
    return tiny_decoder(**(gpt2_shape if request.param == "gpt2" else {}))


def test_generate_greedy_is_argmax(model):
    ids = random_ids(2, 9)
    result = generate(model, ids, max_new_tokens=30, stop=())
    assert torch.equal(result, plain_greedy(model, ids, 30))


def test_generate_padded_batch_is_single(model):
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :6], mask[2, :1] = False, False
    batch = generate(model, ids, max_new_tokens=20, stop=(), attention_mask=mask)
    assert torch.equal(batch[:, :9], ids)
    for b in range(3):
        single = plain_greedy(model, ids[b : b + 1, mask[b]], 20)
        assert torch.equal(batch[b, 9:], single[0, -20:])


def test_generate_ends_at_stop(model):
    """Every row ends at its own first stop token, is filled from there, and disturbs no other."""
    ids = random_ids(4, 5)
    free = plain_greedy(model, ids, 20)[:, 5:]
    ends = {int(free[0, 3]), int(free[1, 8]), int(free[2, 0])}
    result = generate(model, ids, max_new_tokens=20, stop=ends)[:, 5:]
    lengths = [
        next((t + 1 for t, token in enumerate(row) if token in ends), 20) for row in free.tolist()
    ]
    assert result.shape[1] == max(lengths)
    assert min(lengths) < max(lengths)
    for b, length in enumerate(lengths):
        assert torch.equal(result[b, :length], free[b, :length])
        assert (result[b, length:] == model.config.eos_ids[0]).all()


def test_generate_finished_rows_cost_nothing(tiny_decoder, monkeypatch):
    model = tiny_decoder()
    ids = random_ids(4, 5, seed=1)
    free = plain_greedy(model, ids, 12)[:, 5:]
    end = int(free[0, 2])
    assert (free == end).nonzero()[0].tolist() == [0, 2]
    assert (free == end).sum() == 1
    batches = []
    forward = type(model).forward

    def counted(self, ids, *args, **options):
        assert not torch.is_grad_enabled()
        batches.append(tuple(ids.shape))
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    generate(model, ids, max_new_tokens=12, stop=end)
    assert batches == [*[(1, 5)] * 4, (4, 1), (4, 1), *[(3, 1)] * 9]


def test_generate_default_stop_is_the_models_end(tiny_decoder):
    model = tiny_decoder(eos_ids=(0,))
    ids = random_ids(1, 5)
    free = plain_greedy(model, ids, 10)
    third = int(free[0, 7])
    other = tiny_decoder(eos_ids=(third,))
    first = free[0, 5:].tolist().index(third)
    assert torch.equal(generate(other, ids, max_new_tokens=10), free[:, : 6 + first])


def test_generate_nothing(model):
    ids = random_ids(2, 5)
    assert torch.equal(generate(model, ids, max_new_tokens=0), ids)


def test_generate_result_can_train(model):
    """The ids come from outside of inference mode: a loss on them has a gradient."""
    ids = generate(model, random_ids(1, 4), max_new_tokens=4, stop=())
    model(ids).sum().backward()
    assert model.embedding.weight.grad is not None


def test_generate_seeds_belong_to_sequences(model):
    ids, mask = random_ids(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2] = False
    options = {"max_new_tokens": 20, "temperature": 1.5, "stop": ()}
    batch = generate(model, ids, seed=7, attention_mask=mask, **options)
    assert torch.equal(batch, generate(model, ids, seed=[7, 8, 9], attention_mask=mask, **options))
    for b in range(3):
        single = generate(model, ids[b : b + 1, mask[b]], seed=7 + b, **options)
        assert torch.equal(batch[b, 6:], single[0, -20:])
    assert not torch.equal(batch, generate(model, ids, seed=8, attention_mask=mask, **options))
    # Also when a sequence before it has left the batch.
    options["stop"] = int(batch[0, 8])
    ended = generate(model, ids, seed=7, attention_mask=mask, **options)
    assert ended[0, 9:].eq(model.config.eos_ids[0]).all()
    length = ended.shape[1]
    for b in (1, 2):
        stops = (batch[b, 6:] == options["stop"]).nonzero()
        count = 6 + int(stops[0, 0]) + 1 if len(stops) else length
        assert count > 9
        assert torch.equal(ended[b, :count], batch[b, :count])
    torch.manual_seed(3)
    first, second = (generate(model, ids[:1], **options) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, generate(model, ids[:1], **options))
    assert not torch.equal(first, second)


def plain_filter(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The definition, token by token, in Python's float64."""
    scores = [x / temperature for x in logits]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[: top_k or len(order)]
    p = {i: math.exp(scores[i] - scores[order[0]]) for i in kept}
    if top_p is not None:
        total, reached, nucleus = sum(p.values()), 0.0, {}
        for i in kept:
            if reached >= top_p:
                break
            nucleus[i] = p[i]
            reached += p[i] / total
        p = nucleus
    if min_p is not None:
        p = {i: x for i, x in p.items() if x >= min_p * max(p.values())}
    total = sum(p.values())
    return [p.get(i, 0.0) / total for i in range(len(logits))]


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sampling_filters_are_the_plain_ones(options):
    logits = 2 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    got = Sampling(**options).probabilities(logits)
    expected = torch.tensor([plain_filter(row, **options) for row in logits.double().tolist()])
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sampling_frequencies(options):
    """40,000 draws stay within 5 standard errors of the plain definition's probabilities."""
    count = 40_000
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    tokens = Sampling(**options).choose(logits.expand(count, -1), [Sampler(2)] * count)
    frequencies = torch.bincount(tokens, minlength=50) / count
    p = torch.tensor(plain_filter(logits[0].double().tolist(), **options))
    assert (frequencies[p == 0] == 0).all()
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-9).all()


def test_sampling_rare_tokens_are_neither_lost_nor_invented():
    """Ends of the range: the last token is reachable, one of probability 0 never is."""
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])

    for draw, expected in ((0.0, 0), (0.4999, 0), (0.5, 2), (1 - 2**-53, 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, d=draw, **k: torch.tensor([d]).double())
            token = Sampling(temperature=1.0).choose(logits, [Sampler(0)])
        assert token.item() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"max_new_tokens": 60}, "5 tokens and 60 new ones exceed the context length of 64"),
        ({"temperature": -1.0}, "temperature must be 0 or a number above, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p must be between 0 and 1, got 1.1"),
        ({"top_k": 3}, "top_k chooses nothing at temperature 0"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, r"ids must be whole numbers \(B, T\)"),
        ({"ids": torch.zeros(1, 5)}, "got torch.float32"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "T at least 1"),
        ({"ids": torch.full((1, 5), 300)}, "ids must be from 0 to 299, got 300"),
        ({"ids": torch.full((1, 5), -1)}, "ids must be from 0 to 299, got -1"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask must have the shape of ids"),
        ({"attention_mask": torch.zeros(1, 5)}, "leaves a prompt without any token"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "must be padded on the left"),
        ({"seed": [1, 2]}, "1 sequences need 1 seeds, got 2"),
    ],
)
def test_generate_refuses(tiny_decoder, options, message):
    options = {"ids": random_ids(1, 5), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(tiny_decoder(), options.pop("ids"), **options)


def test_stream_is_generate(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0,))
    ids = random_ids(1, 6) % len(tiny_tokenizer)
    for options in ({}, {"temperature": 1.2, "top_k": 100, "seed": 5}):
        whole = generate(model, ids, max_new_tokens=50, **options)[0, 6:].tolist()
        if whole[-1] == 0:
            whole.pop()
        pieces = list(stream(model, ids, tiny_tokenizer, max_new_tokens=50, **options))
        assert "".join(pieces) == tiny_tokenizer.decode(whole)
        assert all(pieces) and len(pieces) > 1


def test_stream_leaves_gradients_alone_between_pieces(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer))
    ids = torch.tensor([tiny_tokenizer.encode("the")])
    for _ in stream(model, ids, tiny_tokenizer, max_new_tokens=3, stop=()):
        assert torch.is_grad_enabled()


def test_stream_refuses_at_once(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder()
    with pytest.raises(ValueError, match=r"stream takes one sequence, ids \(1, T\), got \(2, 3\)"):
        stream(model, random_ids(2, 3), tiny_tokenizer, max_new_tokens=3)
    with pytest.raises(ValueError, match="top_p must be"):
        stream(
            model, random_ids(1, 3), tiny_tokenizer, max_new_tokens=3, temperature=1.0, top_p=2.0
        )


def test_generate_smollm2_batch_and_stream(smollm2_pair):
    from llmcore.text import TemplateChat

    model, tokenizer = smollm2_pair
    chat = TemplateChat(tokenizer)
    questions = ["What is the capital of France?", "Say hello, please, in one short sentence."]
    prompts = [chat.encode([{"role": "user", "content": q}]) for q in questions]
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    batch = generate(model, ids, max_new_tokens=9, attention_mask=mask)[:, longest:]
    for row, prompt in zip(batch.tolist(), prompts, strict=True):
        single = generate(model, torch.tensor([prompt]), max_new_tokens=9)[0, len(prompt) :]
        assert row[: len(single)] == single.tolist()
        assert set(row[len(single) :]) <= {2}
        answer = "".join(stream(model, torch.tensor([prompt]), tokenizer, max_new_tokens=9))
        assert answer == tokenizer.decode(t for t in single.tolist() if t != 2)


def test_generate_stays_in_the_vocabulary_at_any_temperature(tiny_decoder) -> None:
    model, ids = tiny_decoder(), torch.tensor([[1, 2, 3]])
    greedy = generate(model, ids, max_new_tokens=1, stop=())
    cold = generate(model, ids, max_new_tokens=1, stop=(), temperature=1e-45, seed=0)
    assert torch.equal(cold, greedy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_refuses_logits_that_are_not_numbers(tiny_decoder, temperature: float) -> None:
    model = tiny_decoder()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits"):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=1, temperature=temperature, seed=0)
