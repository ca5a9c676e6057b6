"""Guesses change how many passes a text takes, and nothing else."""

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

from llmcore.generation.speculative import (
    DraftModel,
    LayerSkipDraft,
    LookupDraft,
    Stats,
    draft_for,
    first_layers,
)

pytestmark = pytest.mark.usefixtures("native_kernels")


class Oracle:
    """Guesses the very tokens that come, but for every third, which it gets wrong."""

    def __init__(self, prompts, answers, guesses):
        self.starts, self.answers = [len(prompt) for prompt in prompts], answers
        self.guesses = guesses
        self.stats = Stats()
        self.rows = set()

    def guess(self, row, ids, most, choose):
        self.rows.add(row)
        done = len(ids) - self.starts[row]
        assert ids[self.starts[row] :] == self.answers[row][:done]
        right = self.answers[row][done : done + min(most, self.guesses)]
        return [7 if (done + i) % 3 == 2 else token for i, token in enumerate(right)]

    def forget(self, row):
        self.rows.discard(row)


@pytest.mark.parametrize("options", [{}, {"paged": True}, {"cache_dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_speculative_is_the_plain_run(tiny_decoder, temperature, options):
    """Greedy and drawn, alone and in a batch where each sequence is guessed another length."""
    model = tiny_decoder()
    options["temperature"] = temperature
    free, _ = alone(model, PROMPTS, **options)
    stop = {free[0][3], free[4][7]}
    expected = alone(model, PROMPTS, stop=stop, **options)
    for batch_size in (1, 3):
        draft = Oracle(PROMPTS, expected[0], guesses=5)
        found = run(
            task_of(model, PROMPTS, stop=stop, batch_size=batch_size, draft=draft, **options)
        )
        assert_same(found, expected)
        assert draft.rows == set()
        assert 2 < draft.stats.tokens_per_pass < 3
        assert draft.stats.tokens == sum(map(len, expected[0])) - len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_speculative_drafts_of_all_kinds(tiny_decoder, gpt2_shape, shape, temperature):
    model = tiny_decoder(**(gpt2_shape if shape == "gpt2" else {}))
    small = tiny_decoder(seed=1, layers=1, **(gpt2_shape if shape == "gpt2" else {}))
    prompts = random_prompts(9, 20, 3)
    expected = alone(model, prompts, new=40, temperature=temperature)
    for draft in (
        LookupDraft(),
        LookupDraft(2, longest=5, shortest=2),
        DraftModel(small),
        DraftModel(model, 3),
        LayerSkipDraft(model, 2),
    ):
        for _ in range(2):  # a draft serves more than one run
            found = run(task_of(model, prompts, new=40, temperature=temperature, draft=draft))
            assert_same(found, expected)
        assert draft.stats.passes > 0


def test_speculative_at_the_end_of_the_context(tiny_decoder):
    """One sequence that has room for no guess beside one that has."""
    model = tiny_decoder()
    prompts = random_prompts(52, 4)
    expected = alone(model, prompts, temperature=0.0)
    draft = Oracle(prompts, expected[0], guesses=8)
    assert_same(run(task_of(model, prompts, temperature=0.0, draft=draft)), expected)


def test_speculative_in_a_window(tiny_decoder):
    model = tiny_decoder(context_length=1500, window=30)
    prompts = random_prompts(1100, 500)
    expected = alone(model, prompts, new=60)
    draft = Oracle(prompts, expected[0], guesses=6)
    assert_same(run(task_of(model, prompts, new=60, draft=draft)), expected)


def test_speculative_counts(tiny_decoder, monkeypatch):
    model = tiny_decoder()
    [prompt] = random_prompts(9)
    [answer], _ = alone(model, [prompt], new=21)
    shapes = shapes_of_passes(model, monkeypatch)
    draft = Oracle([prompt], [answer], guesses=5)
    run(task_of(model, [prompt], new=21, draft=draft))
    # token 0 comes of the prompt; then every pass goes up to the wrong guess and corrects it
    assert shapes == [(1, 9), *[(1, 6)] * 6, (1, 3)]
    stats = draft.stats
    assert (stats.passes, stats.tokens, stats.guessed, stats.accepted) == (7, 20, 32, 13)
    assert str(stats) == "13 of 32 guesses accepted (41%), 2.86 tokens a pass"
    assert (Stats().acceptance_rate, Stats().tokens_per_pass) == (0.0, 0.0)


def test_speculative_own_first_layers_share_everything(tiny_decoder):
    model = tiny_decoder()
    short = first_layers(model, 2)
    assert short.config.layers == 2 and len(model.blocks) == 3
    mine = set(model.parameters())
    assert all(parameter in mine for parameter in short.parameters())
    other = tiny_decoder(layers=2)
    other.load_state_dict(short.state_dict())
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(short(ids), other(ids))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_speculative_own_guesses_are_all_right(tiny_decoder, temperature):
    """A model that guesses for itself draws by the run's own numbers, too."""
    model = tiny_decoder()
    [prompt] = random_prompts(9)
    draft = DraftModel(model, 4)
    run(task_of(model, [prompt], new=31, temperature=temperature, draft=draft))
    assert (draft.stats.acceptance_rate, draft.stats.tokens_per_pass) == (1.0, 5.0)


def test_speculative_lookup_goes_on_as_before():
    draft = LookupDraft(3, longest=2)
    text = [1, 2, 3, 4, 9, 2, 3]
    assert draft.guess(0, text, 8, None) == [4, 9, 2]
    assert draft.guess(0, text, 2, None) == [4, 9]
    assert draft.guess(1, [5, 6], 8, None) == []
    assert draft.guess(0, [*text, 8, 3], 8, None) == [8, 3]  # one token, its latest occurrence
    assert draft.guess(0, [*text, 8, 3, 3, 3], 8, None) == [3]
    assert LookupDraft(3, shortest=2).guess(0, [1, 2, 3, 1], 8, None) == []
    draft.forget(0)
    assert draft.guess(0, [6, 6], 8, None) == [6]


def test_speculative_refuses(tiny_decoder):
    model = tiny_decoder()
    for make in (LookupDraft, lambda guesses: DraftModel(model, guesses)):
        with pytest.raises(ValueError, match="guesses must be at least 1, got 0"):
            make(0)
    with pytest.raises(ValueError, match="shortest must be from 1 to longest, got 3 and 2"):
        LookupDraft(longest=2, shortest=3)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers must be from 1 to 2, got {layers}"):
            LayerSkipDraft(model, layers)
    with pytest.raises(ValueError, match="draft: got 'oracle', expected 'lookup'"):
        draft_for(model, "oracle")
    with pytest.raises(ValueError, match="draft: its model has 301 tokens, this one 300"):
        draft_for(model, DraftModel(tiny_decoder(vocab_size=301)))
    assert isinstance(draft_for(model, "lookup"), LookupDraft)
    assert draft_for(model, None) is None
