"""Beam search: what transformers finds, for each prompt of a batch, whatever ends it."""

import pytest
import torch

from llmcore.generate import generate
from llmcore.generation.beam import BeamSearch
from llmcore.models.convert import to_transformers

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts(seed=0):
    ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :3] = False
    return ids, mask


def theirs(model, ids, mask, **options):
    """Each prompt's new ids by transformers, which is given one prompt at a time."""
    stock = to_transformers(model)
    found = []
    for row, real in zip(ids, mask, strict=True):
        prompt = row[None, real]
        result = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            eos_token_id=list(model.config.eos_ids) or None, **options,
        )  # fmt: skip
        found.append(result[0, prompt.shape[1] :].tolist())
    return found


def trimmed(row, ends):
    """Up to the end token, without what fills the row."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


CASES = [
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 5, "length_penalty": 0.5, "early_stopping": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 12])
def test_beam_search_is_that_of_transformers(tiny_decoder, options, count):
    pytest.importorskip("transformers")
    for seed, ends in ((0, ()), (1, range(0, 40)), (2, range(0, 120, 4))):
        model = tiny_decoder(seed=seed, eos_ids=tuple(ends))
        with torch.no_grad():  # sharper than it comes: scores should not be near one another
            model.norm.weight.mul_(0.5)
        ids, mask = prompts(seed)
        result = generate(model, ids, attention_mask=mask, max_new_tokens=count, **options)[:, 7:]
        expected = theirs(model, ids, mask, max_new_tokens=count, **options)
        for row, other in zip(result.tolist(), expected, strict=True):
            assert trimmed(row, ends) == trimmed(other, ends)


@pytest.mark.usefixtures("native_kernels")
def test_beam_search_of_a_batch_is_each_alone(tiny_decoder):
    model = tiny_decoder(eos_ids=tuple(range(30)))
    ids, mask = prompts()
    options = {"max_new_tokens": 15, "num_beams": 3, "return_logprobs": True}
    together, logprobs = generate(model, ids, attention_mask=mask, **options)
    for b in range(3):
        alone, alone_logprobs = generate(model, ids[b : b + 1, mask[b]], **options)
        count = alone_logprobs.shape[1]
        assert torch.equal(together[b, 7 : 7 + count], alone[0, -count:])
        assert torch.equal(logprobs[b, :count], alone_logprobs[0])
        assert (logprobs[b, count:] == 0).all()


@torch.no_grad()
def test_beam_search_log_probabilities_are_the_models(tiny_decoder):
    model = tiny_decoder(eos_ids=())
    ids, _ = prompts()
    result, logprobs = generate(model, ids, max_new_tokens=8, num_beams=3, return_logprobs=True)
    expected = model(result[:, :-1])[:, 6:].log_softmax(dim=-1)
    expected = expected.gather(2, result[:, 7:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_beam_search_as_text(tiny_decoder, tiny_tokenizer):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0, *range(5, 20)))
    options = {"max_new_tokens": 9, "num_beams": 3}
    texts = generate(model, ["the", "hi and"], tokenizer=tiny_tokenizer, **options)
    for prompt, text in zip(["the", "hi and"], texts, strict=True):
        ids = torch.tensor([tiny_tokenizer.encode(prompt)])
        new = trimmed(generate(model, ids, **options)[0, ids.shape[1] :].tolist(), range(5, 20))
        assert text == tiny_tokenizer.decode(t for t in new if t not in model.config.eos_ids)
    assert generate(model, "hi", tokenizer=tiny_tokenizer, max_new_tokens=0, num_beams=2) == ""


def test_beam_search_refuses(tiny_decoder, tiny_tokenizer):
    model, (ids, _) = tiny_decoder(), prompts()
    for options, message in (
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 200}, "num_beams 200 compares 400 tokens, there are 300"),
        ({"num_beams": 2, "temperature": 1.0}, "takes no temperature"),
        ({"num_beams": 2, "early_stopping": "ever"}, "early_stopping must be True, False or"),
        ({"num_beams": 2, "stop": "x", "tokenizer": tiny_tokenizer}, "ends at token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, max_new_tokens=3, **options)
    assert BeamSearch(2).length_penalty == 1.0
