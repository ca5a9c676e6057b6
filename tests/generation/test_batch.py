"""The loop of passes: whatever is beside a sequence, before it or in its cache, its bits are the
same."""

import pytest
import torch
from generation_runs import (
    PROMPTS,
    alone,
    assert_same,
    random_prompts,
    run,
    shapes_of_passes,
    task_of,
)

from llmcore.generate import generate
from llmcore.generation import PrefixCache
from llmcore.generation.batch import steps
from llmcore.generation.reading import READ_BLOCK, Reader, together
from llmcore.generation.speculative import LookupDraft
from llmcore.models import KVCache, PagedKVCache
from llmcore.models.packed import pack_weights

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("options", [{}, {"paged": True}, {"cache_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batch_is_each_prompt_alone(tiny_decoder, temperature, options):
    """More prompts than places, answers of all lengths: every token and logit of its own run."""
    model = tiny_decoder()
    options["temperature"] = temperature
    free, _ = alone(model, PROMPTS, **options)
    ends = {free[0][3], free[1][0], free[4][7], free[5][1]}
    expected = alone(model, PROMPTS, stop=ends, **options)
    lengths = list(map(len, expected[0]))
    assert min(lengths) == 1 and max(lengths) == 12 and len(set(lengths)) > 3
    for batch_size in (1, 2, 3, 5, None):
        found = run(task_of(model, PROMPTS, stop=ends, batch_size=batch_size, **options))
        assert_same(found, expected)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_batch_of_packed_weights(tiny_decoder, format):
    """What rounds its products' inputs keeps every bit, too: beside others, read at once or step by
    step, from a prefix cache, with guesses, on one thread or two."""
    model = tiny_decoder()
    pack_weights(model, format)
    expected = alone(model, PROMPTS)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_same(run(task_of(model, PROMPTS, batch_size=3)), expected)
    finally:
        torch.set_num_threads(threads)
    assert_same(run(task_of(model, PROMPTS, draft=LookupDraft())), expected)
    prefixes = PrefixCache(model)
    for _ in range(2):
        assert_same(run(task_of(model, PROMPTS, prefixes=prefixes)), expected)
    for prompt, tokens, logits in zip(PROMPTS, *expected, strict=True):
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            whole = model(ids, KVCache(model.config, 1))
        assert torch.equal(whole[0, len(prompt) - 1 :], logits)


def test_batch_gives_a_place_to_the_next_prompt_at_once(tiny_decoder):
    model = tiny_decoder()
    free, _ = alone(model, PROMPTS)
    ends = {free[0][3], free[1][5]}
    begun, passes = set(), 0
    for step in steps(task_of(model, PROMPTS, stop=ends, batch_size=3)):
        rows = set(step.rows)
        if rows <= begun:
            assert len(rows) == 3 or len(begun) == len(PROMPTS)
            passes += 1
        else:
            assert not rows & begun
        begun |= rows
    lengths = [len(tokens) for tokens in alone(model, PROMPTS, stop=ends)[0]]
    assert sum(lengths) / 3 < passes + len(PROMPTS) / 3 < sum(lengths) / 2


def test_batch_prompts_are_read_in_blocks(tiny_decoder, monkeypatch):
    model = tiny_decoder(context_length=2000)
    [prompt] = random_prompts(2 * READ_BLOCK + 90)
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[:, -1]
    shapes = shapes_of_passes(model, monkeypatch)
    cache = KVCache(model.config, 1)
    assert torch.equal(Reader(model, cache).read(prompt), expected)
    assert shapes == [(1, READ_BLOCK), (1, READ_BLOCK), (1, 90)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_reads_a_common_beginning_once(tiny_decoder, monkeypatch, batch_size):
    model = tiny_decoder()
    system, *ends = random_prompts(20, 3, 6, 1)
    prompts = [*(system + end for end in ends), system]
    expected = alone(model, prompts, new=1)
    shapes = shapes_of_passes(model, monkeypatch)
    assert_same(run(task_of(model, prompts, new=1, batch_size=batch_size)), expected)
    if batch_size == 1:
        assert shapes == [(1, 23), (1, 6), (1, 1), (1, 1)]
    else:  # two prompts behind what they share, and again
        assert shapes == [(1, 20), (2, 6), (2, 2)]


def test_batch_reads_short_prompts_together(tiny_decoder):
    """As many as a block has room for, less what all of them begin with."""
    short, long = random_prompts(30, READ_BLOCK)
    assert together([short]) == (1, 29)
    assert together([short, short, short]) == (3, 29)
    assert together([[1, *short]] + [[i, *short] for i in range(2, 100)]) == (READ_BLOCK // 31, 0)
    assert together([long, short]) == (1, READ_BLOCK - 1)
    assert together([[*long, 1], [*long, 2, 3], short]) == (2, READ_BLOCK)
    assert together([[5], [5, 6]]) == (2, 0)


@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_reader_goes_back_in_its_text(tiny_decoder, kind):
    model = tiny_decoder(context_length=900, window=40)
    [first] = random_prompts(700)
    reader = Reader(model, kind(model.config, 1))
    for text in (first, [*first[:690], 7, 8], first[:300], first, first):
        with torch.no_grad():
            expected = model(torch.tensor([text]))[:, -1]
        assert torch.equal(reader.read(text), expected)
        assert reader.ids == text and reader.cache.counts == [len(text)]


def test_batch_closed_early_lets_go(tiny_decoder):
    run_ = steps(task_of(tiny_decoder(), PROMPTS, batch_size=2))
    assert next(run_).rows == [0, 1]
    run_.close()
    assert list(run_) == []


def test_batch_of_nothing(tiny_decoder):
    assert list(steps(task_of(tiny_decoder(), []))) == []
    assert list(steps(task_of(tiny_decoder(), PROMPTS, new=0))) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], []], {}, "prompt 1 is without any token"),
        ([[3], [300]], {}, "ids must be from 0 to 299, got 300"),
        ([[3, -1]], {}, "ids must be from 0 to 299, got -1"),
        ([[3] * 60], {}, "60 tokens and 12 new ones exceed the context length of 64"),
        ([[3]], {"new": -1}, "max_new_tokens must be 0 or more, got -1"),
        ([[3]], {"batch_size": 0}, "batch_size must be None or at least 1, got 0"),
    ],
)
def test_batch_refuses(tiny_decoder, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(tiny_decoder(), prompts, **options)


def test_generate_takes_lists_of_any_lengths(tiny_decoder):
    model = tiny_decoder()
    expected, _ = alone(model, PROMPTS)
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 0, "stop": ()}
    whole = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    prefixes = PrefixCache(model)
    for setup in ({}, {"batch_size": 3, "draft": "lookup"}, {"prefix_cache": prefixes}):
        assert generate(model, PROMPTS, **options, **setup) == whole
    assert len(prefixes) == len(PROMPTS)
    result, logprobs = generate(model, PROMPTS, return_logprobs=True, **options)
    assert result == whole and logprobs.shape == (len(PROMPTS), 12)
    with pytest.raises(ValueError, match="attention_mask belongs to ids"):
        generate(model, [[3]], attention_mask=torch.ones(1, 1), **options)
