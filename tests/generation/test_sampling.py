"""The choice of a token: by the plain definition, as transformers filters, alone as in a batch."""

import math

import pytest
import torch

from llmcore.generation.sampling import (
    Sampler,
    Sampling,
    log_probabilities,
    rows_of,
    samplers_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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
    {"temperature": 0.8, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 400, "top_p": 0.99},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.5},
]


class Fixed(Sampler):
    """A sampler whose next number is known."""

    def __init__(self, draw, prompt=()):
        super().__init__(0, prompt)
        self._draw = draw

    def draw(self):
        return self._draw


def random_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(logits, seen=(), *, temperature, top_k=None, top_p=None, min_p=None, **more):
    """The definition, token by token, in Python's float64: (probability, token), best first."""
    penalty = more.get("repetition_penalty", 1.0)
    scores = [
        (x if i not in seen else x / penalty if x > 0 else x * penalty) / temperature
        for i, x in enumerate(logits)
    ]
    ranked = sorted(((x, i) for i, x in enumerate(scores)), key=lambda pair: -pair[0])[:top_k]
    p = [(math.exp(x - ranked[0][0]), i) for x, i in ranked]
    if top_p is not None:
        total, reached, nucleus = sum(x for x, _ in p), 0.0, []
        for x, i in p:
            if reached >= top_p * total:
                break
            nucleus.append((x, i))
            reached += x
        p = nucleus
    if min_p is not None:
        p = [(x, i) for x, i in p if x >= min_p * p[0][0]]
    total = sum(x for x, _ in p)
    return [(x / total, i) for x, i in p]


def check_draws(options, logits, expected, seen=(), tokens=None):
    """Every token is drawn in the middle and just inside the ends of its stretch of [0, 1).

    The tokens stand in their own order.
    """
    below = 0.0
    for p, token in sorted(expected, key=lambda pair: pair[1]):
        if p > 1e-5 and (tokens is None or token in tokens):
            draws = [below + share * p for share in (0.01, 0.5, 0.99)]
            samplers = [Fixed(draw, seen) for draw in draws]
            chosen = Sampling(**options).choose(rows_of(logits.expand(3, -1)), samplers)
            assert chosen == [token] * 3, p
        below += p


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sampling_is_the_plain_definition(options):
    for row in random_logits(3, 50):
        expected = plain(row.double().tolist(), {3, 7, 40}, **options)
        check_draws(options, row[None], expected, seen=(3, 7, 7, 40))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sampling_is_that_of_transformers(options):
    process = pytest.importorskip("transformers.generation.logits_process")
    made = {
        "repetition_penalty": process.RepetitionPenaltyLogitsProcessor,
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    theirs = process.LogitsProcessorList(
        make(options[name]) for name, make in made.items() if name in options
    )
    seen = [3, 7, 7, 40]
    row = random_logits(1, 50, seed=1)
    ranked = theirs(torch.tensor([seen]), row).double().softmax(dim=-1)[0].sort(descending=True)
    expected = [(p, i) for p, i in zip(*map(torch.Tensor.tolist, ranked), strict=True) if p > 0]
    check_draws(options, row, expected, seen)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sampling_of_many_tokens(options, scale):
    """A flat row, whose filters leave many, and one of few probable tokens."""
    row = random_logits(5003, scale=scale, seed=2)
    expected = plain(row.double().tolist(), **options)
    some = {0, 255, 256, 257, 4991, 4992, 5002} | {token for _, token in expected[::50]}
    last = {token for _, token in expected[-2:]}
    check_draws(options, row[None], expected, tokens=some | last)
    for draw, end in ((0.0, min), (1 - 2**-53, max)):
        p, token = end(expected, key=lambda pair: pair[1])
        assert p < 1e-12 or Sampling(**options).choose(rows_of(row[None]), [Fixed(draw)]) == [token]


@pytest.mark.parametrize("options", [{}, *FILTERS], ids=str)
def test_sampling_a_batch_is_each_alone(options):
    """Also where some rows need more ranks than others, and on both sides of a block's end."""
    for size in (300, 4096, 4133):
        logits = random_logits(6, size, seed=3)
        logits[1] *= 0.01
        logits[4] *= 5
        prompts = torch.randint(size, (6, 9), generator=torch.Generator().manual_seed(4)).tolist()
        together = samplers_of(prompts, 11)
        alone = [samplers_of([prompts[b]], 11 + b) for b in range(6)]
        for _ in range(5):
            tokens = Sampling(**options).choose(rows_of(logits), together)
            for b in range(6):
                assert Sampling(**options).choose(rows_of(logits[b : b + 1]), alone[b]) == [
                    tokens[b]
                ]


def test_sampling_frequencies():
    count = 4000
    logits = random_logits(1, 50, seed=1)
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.8}
    tokens = Sampling(**options).choose(rows_of(logits.expand(count, -1)), [Sampler(2)] * count)
    frequencies = torch.bincount(torch.tensor(tokens), minlength=50) / count
    p = torch.zeros(50)
    for chance, token in plain(logits[0].double().tolist(), **options):
        p[token] = chance
    assert (frequencies[p == 0] == 0).all()
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-9).all()


def test_sampling_keeps_the_equals_of_the_last():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        sampling = Sampling(temperature=1.0, **options)
        tokens = sampling.choose(rows_of(logits.expand(400, -1)), [Sampler(0)] * 400)
        assert set(tokens) == {1, 2, 3, 4}


def test_sampling_ends_of_the_range():
    """The last token is reachable, one of probability 0 never is."""
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])
    for draw, expected in ((0.0, 0), (0.4999, 0), (0.5, 2), (1 - 2**-53, 2)):
        for options in ({}, {"top_k": 3}, {"min_p": 0.01}):
            sampling = Sampling(temperature=1.0, **options)
            assert sampling.choose(rows_of(logits), [Fixed(draw)]) == [expected]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30, 1e30, 1e308])
def test_sampling_at_extreme_temperatures(temperature):
    logits = torch.tensor([[-30.0, 1.0, 30.0, float("-inf")]])
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}):
        sampling = Sampling(temperature=temperature, **options)
        draws = (0.1, 0.5, 0.9)
        chosen = {sampling.choose(rows_of(logits), [Fixed(draw)])[0] for draw in draws}
        assert chosen == ({2} if temperature < 1 else {0, 1, 2})


def test_sampling_greedy_takes_the_first_of_equals():
    logits = torch.randint(3, (20, 1000), generator=torch.Generator().manual_seed(0)).float()
    tokens = Sampling().choose(rows_of(logits), [Sampler(0)] * 20)
    assert tokens == logits.argmax(dim=-1).tolist()


def test_sampling_repetition_penalty_sees_prompt_and_answer():
    logits = torch.tensor([[2.0, 1.9, -1.0, 1.8]])
    sampling = Sampling(repetition_penalty=1.5)
    [sampler] = samplers_of([[0]], 0)
    assert [sampling.choose(rows_of(logits), [sampler])[0] for _ in range(4)] == [1, 3, 0, 0]
    assert sampler.seen.tolist() == [0, 1, 3, 0, 0]
    assert logits.tolist() == torch.tensor([[2.0, 1.9, -1.0, 1.8]]).tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sampling_refuses_logits_that_are_not_numbers(options, bad):
    logits = random_logits(3, 200)
    logits[1, 77] = bad
    with pytest.raises(ValueError, match=f"the highest of sequence 1 is {bad}"):
        Sampling(**options).choose(rows_of(logits), [Fixed(0.1)] * 3)
    logits[1] = float("-inf")
    with pytest.raises(ValueError, match="the highest of sequence 1 is -inf"):
        Sampling(**options).choose(rows_of(logits), [Fixed(0.1)] * 3)


def test_log_probabilities_are_the_models():
    logits = random_logits(3, 50)
    tokens = [4, 0, 49]
    expected = logits.double().log_softmax(dim=-1)[torch.arange(3), tokens].float()
    torch.testing.assert_close(torch.tensor(log_probabilities(logits, tokens)), expected)


@pytest.mark.parametrize("drawn", [0, 3])
def test_sampler_copy_goes_on_alike(drawn):
    """And neither changes the other."""
    logits = random_logits(1, 300)
    sampling = Sampling(temperature=1.5, repetition_penalty=1.3)
    sampler = Sampler(5, [3, 7])
    for _ in range(drawn):
        sampling.choose(rows_of(logits), [sampler])
    twin = sampler.copy()
    ahead = [sampling.choose(rows_of(logits), [twin]) for _ in range(20)]
    assert sampler.seen.tolist() == twin.seen.tolist()[: 2 + drawn]
    assert [sampling.choose(rows_of(logits), [sampler]) for _ in range(20)] == ahead
