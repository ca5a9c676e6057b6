"""Runs of the loop of passes whose every bit is kept, for tests to compare."""

import torch

from llmcore.generation.batch import Setup, Task, steps
from llmcore.generation.sampling import Sampler, Sampling
from llmcore.generation.stopping import Stopping


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 300, (n,), generator=generator).tolist() for n in lengths]


def task_of(model, prompts, *, stop=(), new=12, temperature=1.5, seeds=None, **setup):
    return Task(
        model,
        prompts,
        new,
        Sampling(temperature),
        Stopping(stop),
        [Sampler(seed) for seed in seeds or range(len(prompts))],
        Setup(**setup),
    )


def run(task):
    """The tokens and the logits of each sequence."""
    tokens, logits = [[] for _ in task.prompts], [[] for _ in task.prompts]
    for step in steps(task):
        for place, row in enumerate(step.rows):
            tokens[row].append(step.tokens[place])
            logits[row].append(step.logits[place])
    return tokens, [torch.stack(rows) if rows else None for rows in logits]


def alone(model, prompts, **options):
    """Each prompt as the only one."""
    pairs = [run(task_of(model, [p], seeds=[i], **options)) for i, p in enumerate(prompts)]
    return [tokens[0] for tokens, _ in pairs], [logits[0] for _, logits in pairs]


def assert_same(first, second):
    assert first[0] == second[0]
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def shapes_of_passes(model, monkeypatch):
    shapes, forward = [], type(model).forward

    def counted(self, ids, *args, **options):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    return shapes


PROMPTS = random_prompts(5, 19, 1, 7, 30, 2, 11)
