"""Generation: greedy is argmax, cached is uncached, batched is single, sampling is what it says."""

import pytest
import torch

from llmcore.generate import best_of, generate, stream
from llmcore.models.convert import to_transformers

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
    assert batches == [(4, 5), (4, 1), (4, 1), *[(3, 1)] * 9]


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


@pytest.mark.usefixtures("native_kernels")
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 9, "seed": 3}])
def test_generate_log_probabilities_are_the_models(model, options):
    """Before temperature, filters and penalty; 0 behind a sequence's end."""
    ids = random_ids(3, 6)
    options |= {"max_new_tokens": 12, "repetition_penalty": 1.2, "return_logprobs": True}
    free = generate(model, ids, stop=(), **options)[0][:, 6:]
    end = int(free[0, 4])
    result, logprobs = generate(model, ids, stop=end, **options)
    assert torch.equal(
        result, generate(model, ids, stop=end, **options | {"return_logprobs": False})
    )
    assert logprobs.shape == result[:, 6:].shape and logprobs.dtype == torch.float32
    expected = model(result[:, :-1])[:, 5:].log_softmax(dim=-1)
    expected = expected.gather(2, result[:, 6:, None])[..., 0]
    for b in range(3):
        stops = (free[b] == end).nonzero()
        count = int(stops[0, 0]) + 1 if len(stops) else 12
        assert count < 6 or b
        torch.testing.assert_close(logprobs[b, :count], expected[b, :count], atol=1e-5, rtol=1e-5)
        assert (logprobs[b, count:] == 0).all()
        alone = generate(model, ids[b : b + 1], stop=end, **options | {"seed": 3 + b})
        assert torch.equal(logprobs[b, :count], alone[1][0])


def test_generate_repetition_penalty_over_prompt_and_answer(tiny_decoder):
    pytest.importorskip("transformers")
    model = tiny_decoder(eos_ids=())
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    result = generate(model, ids, attention_mask=mask, max_new_tokens=20, repetition_penalty=1.7)
    stock = to_transformers(model)
    for b in range(2):
        prompt = ids[b : b + 1, mask[b]]
        expected = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
            repetition_penalty=1.7, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(result[b, 6:], expected[0, prompt.shape[1] :])


def test_generate_text(tiny_decoder, tiny_tokenizer):
    """A text gives a text, several a list; each what its ids give."""
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0, *range(20, 30)))
    options = {"max_new_tokens": 12, "temperature": 1.5}
    prompts = ["the hat", "hi", "12 and 12"]
    texts = generate(model, prompts, tokenizer=tiny_tokenizer, seed=5, **options)
    for b, prompt in enumerate(prompts):
        ids = torch.tensor([tiny_tokenizer.encode(prompt)])
        new = generate(model, ids, seed=5 + b, **options)[0, ids.shape[1] :].tolist()
        assert texts[b] == tiny_tokenizer.decode(t for t in new if t not in model.config.eos_ids)
        alone = generate(model, prompt, tokenizer=tiny_tokenizer, seed=5 + b, **options)
        assert texts[b] == alone
        assert "".join(stream(model, prompt, tiny_tokenizer, seed=5 + b, **options)) == alone
    text, logprobs = generate(
        model, "hi", tokenizer=tiny_tokenizer, return_logprobs=True, **options
    )
    assert isinstance(text, str) and logprobs.shape[0] == 1


def test_generate_text_refuses(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer))
    with pytest.raises(ValueError, match="prompts as text need a tokenizer"):
        generate(model, "hi", max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 1 is without any token"):
        generate(model, ["hi", ""], max_new_tokens=1, tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="attention_mask belongs to ids"):
        generate(
            model, ["hi"], max_new_tokens=1, tokenizer=tiny_tokenizer,
            attention_mask=torch.ones(1, 2),
        )  # fmt: skip


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("width", [1, 6])
def test_best_of_ranks_what_generate_gives(model, width):
    ids, mask = random_ids(2, width), torch.ones(2, width, dtype=torch.bool)
    mask[1, : width - 1] = False  # a prompt of one token beside a longer one
    options = {"max_new_tokens": 8, "temperature": 1.2, "stop": list(range(30, 60))}
    found = best_of(model, ids, 3, attention_mask=mask, seed=4, **options)
    for b, (answers, scores) in enumerate(found):
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        expected = []
        for i in range(3):
            result, logprobs = generate(
                model, ids[b : b + 1, mask[b]], seed=4 + 3 * b + i, return_logprobs=True, **options
            )
            new = result[0, -logprobs.shape[1] :].tolist()
            expected.append((float(logprobs.double().mean()), new, logprobs[0].tolist()))
        expected.sort(reverse=True)
        assert scores == pytest.approx([score for score, _, _ in expected])
        assert [(a.tokens, a.logprobs) for a in answers] == [x[1:] for x in expected]
    again = best_of(
        model, ids, 3, attention_mask=mask, seed=4, scorer=lambda a: -len(a.tokens), **options
    )
    assert [[-len(a.tokens) for a in x.answers] for x in again] == [x.scores for x in again]


def test_best_of_text(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0,))
    options = {"tokenizer": tiny_tokenizer, "max_new_tokens": 8, "seed": 1}
    best = best_of(model, "the", 4, scorer=lambda answer: answer.text.count("a"), **options)
    assert best.scores == [answer.text.count("a") for answer in best.answers]
    assert len({answer.text for answer in best.answers}) > 1
    several = best_of(model, ["the"], 4, scorer=lambda answer: answer.text.count("a"), **options)
    assert several == [best]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of(model, "the", 0, **options)
