"""`llmcore bench step`: a training step of a whole model, against the same model in plain torch.

Forward, backward and AdamW (torch's fused one for everybody) of GPT-2 small's shape, float32. The
contenders start from the same weights and read the same tokens; they take turns, a step each.
Before that they are held to each other: twenty steps on short rows, whose losses may differ by
1e-4. The losses of the timed steps are held to the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcore.models import Decoder, TransformerConfig

from . import machine, memory, timing
from .report import JsonFile
from .timing import Contender, Plan

GPT2_SMALL = TransformerConfig(
    vocab_size=50257,
    width=768,
    layers=12,
    heads=12,
    kv_heads=12,
    head_width=64,
    feed_forward=3072,
    context_length=1024,
    norm="layer_norm",
    activation="gelu_tanh",
    positions="learned",
    bias=True,
)
BATCH = (4, 512)
QUICK_CONFIG = dataclasses.replace(GPT2_SMALL, layers=2, vocab_size=8192)
QUICK_BATCH = (2, 256)
"""Of a quick run: a sixth of the model, on an eighth of the tokens."""

CHECKED_STEPS, CHECKED_BATCH, NEAR = 20, (1, 64), 1e-4
"""Steps whose losses must agree, and how nearly."""

RATIO = 1.3
"""What is to be reached, in times plain torch's eager step."""

OURS, EAGER, COMPILED = "llmcore", "torch eager", "torch.compile"
PARTS = {
    "linear": ("llmcore::linear_forward", "llmcore::linear_backward", "aten::addmm", "aten::mm"),
    "head and loss": ("linear_cross_entropy", "log_softmax", "nll_loss"),
    "attention": ("attention",),
    "norms": ("layer_norm", "rms_norm"),
    "activation": ("gelu",),
    "AdamW": ("adamw",),
    "embeddings": ("embedding",),
}
"""What an operator's name contains, the first that fits."""


class PlainBlock(nn.Module):
    """GPT-2's block as one writes it in torch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, config.norm_eps)
        self.up = nn.Linear(width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.down(hidden)


class PlainGPT2(nn.Module):
    """GPT-2 in plain torch, with tied embeddings."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of targets (B, T), given ids (B, T)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.embedding(ids) + self.position_embedding(places)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_name(ours: str) -> str:
    """The name in PlainGPT2 of a weight of Decoder."""
    for part, plain in ((".attention.", "."), (".feed_forward.", ".")):
        ours = ours.replace(part, plain)
    return ours


def plain_twin(model: Decoder) -> PlainGPT2:
    """The same weights in plain torch."""
    plain = PlainGPT2(model.config)
    plain.load_state_dict({plain_name(n): t.clone() for n, t in model.state_dict().items()})
    return plain


@dataclass
class Stepper:
    """A model, its optimiser, and the losses of the steps it took."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, batch: tuple[int, int], classes: int) -> float:
        """One update on the tokens of its next number."""
        generator = torch.Generator().manual_seed(len(self.losses))
        tokens = torch.randint(classes, (batch[0], batch[1] + 1), generator=generator)
        loss = self.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]


def steppers(config: TransformerConfig, names: Sequence[str]) -> list[Stepper]:
    """Contenders that start from the same weights."""
    found = []
    for name in names:
        torch.manual_seed(0)
        model = Decoder(config).train()
        if name == OURS:
            found.append(Stepper(name, model.loss, list(model.parameters())))
            continue
        plain = plain_twin(model).train()
        loss: Any = torch.compile(plain) if name == COMPILED else plain
        found.append(Stepper(name, loss, list(plain.parameters())))
    return found


def difference(contenders: Sequence[Stepper]) -> float:
    """The largest between the losses of the first one and of another one at the same step."""
    first, *others = (stepper.losses for stepper in contenders)
    return max(abs(a - b) for other in others for a, b in zip(first, other, strict=False))


def checked(config: TransformerConfig) -> float:
    """The difference of ours from plain torch over CHECKED_STEPS steps."""
    pair = steppers(config, (OURS, EAGER))
    for stepper in pair:
        for _ in range(CHECKED_STEPS):
            stepper.step(CHECKED_BATCH, config.vocab_size)
    return difference(pair)


@dataclass(frozen=True)
class Measured:
    """A contender: seconds of its steps, and the bytes a step takes beyond weights and moments."""

    name: str
    seconds: tuple[float, ...]
    extra: int | None

    @property
    def median(self) -> float:
        return timing.quantile(self.seconds, 0.5)


@dataclass
class Found(JsonFile):
    """What a run measured; `parts` are seconds of a step of ours and of plain torch's."""

    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine.describe)
    differences: dict[str, float] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        times = {m.name: m.median for m in self.measured}
        return times[EAGER] / times[OURS]

    def as_json(self) -> dict[str, Any]:
        return {"format": 1, **dataclasses.asdict(self)}


def measure(
    contenders: Sequence[Stepper], batch: tuple[int, int], classes: int, rounds: int
) -> list[Measured]:
    """All of them in turn."""
    calls = [Contender(s.name, partial(s.step, batch, classes)) for s in contenders]
    plan = Plan(warm_up=0.0, turn=0.0, total=0.0, fewest_rounds=rounds, most_rounds=rounds)
    timings = timing.measure(calls, plan)
    extras = [memory.extra(call, calls=1) for call in calls]
    return [
        Measured(call.name, found.seconds, extra)
        for call, found, extra in zip(calls, timings, extras, strict=True)
    ]


def parts_of(stepper: Stepper, batch: tuple[int, int], classes: int) -> dict[str, float]:
    """Seconds of one step by what they are for."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        stepper.step(batch, classes)
    parts = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for event in seen.key_averages():
        name = event.key.lower()
        part = next((p for p, words in PARTS.items() if any(w in name for w in words)), "the rest")
        parts[part] += event.self_cpu_time_total / 1e6
    return parts


def lines_of(found: Found) -> Iterator[str]:
    times = {m.name: m.median for m in found.measured}
    yield f"\n{'':<16}{'step, s':>9}{'quartiles':>16}{'eager / it':>12}{'extra memory, MB':>18}"
    for m in found.measured:
        low, high = (timing.quantile(m.seconds, q) for q in (0.25, 0.75))
        extra = "?" if m.extra is None else f"{m.extra / 1e6:,.0f}"
        yield (
            f"{m.name:<16}{m.median:>9.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{times[EAGER] / m.median:>11.2f}x{extra:>18}"
        )
    word = "yes" if found.ratio >= RATIO else "NO"
    yield f"{RATIO:g}x torch eager reached: {word}"
    extras = {m.name: m.extra for m in found.measured}
    ours, eager = extras[OURS], extras[EAGER]
    if ours is not None and eager is not None:
        yield f"less memory than torch eager: {'yes' if ours < eager else 'NO'}"
    names = list(found.parts)
    yield f"\n{'seconds of a step, profiled':<28}" + "".join(f"{name:>14}" for name in names)
    for part in (*PARTS, "the rest"):
        yield f"{part:<28}" + "".join(f"{found.parts[name][part]:>14.3f}" for name in names)


def run(args: argparse.Namespace, threads: int) -> int:
    """The command: 1 when the losses differ."""
    config, batch = (QUICK_CONFIG, QUICK_BATCH) if args.quick else (GPT2_SMALL, BATCH)
    rounds = 3
    before = torch.get_num_threads()
    settings = {"threads": threads, "batch": batch, "rounds": rounds, "quick": args.quick}
    found = Found({**settings, "config": dataclasses.asdict(config)})
    print(
        f"\nA training step, {config.layers} layers of {config.width}, vocabulary "
        f"{config.vocab_size}, {batch[0]} x {batch[1]} tokens, float32, {threads} threads",
        flush=True,
    )
    try:
        torch.set_num_threads(threads)
        found.differences[f"{CHECKED_STEPS} steps of 1 x 64"] = checked(config)
        names = [OURS, EAGER]
        if not (args.no_compile or args.quick):
            names.append(COMPILED)
        contenders = steppers(config, names)
        found.measured = measure(contenders, batch, config.vocab_size, rounds)
        found.differences[f"{rounds + 1} steps of {batch[0]} x {batch[1]}"] = difference(contenders)
        for stepper in contenders[:2]:
            found.parts[stepper.name] = parts_of(stepper, batch, config.vocab_size)
    finally:
        torch.set_num_threads(before)
    same = all(value <= NEAR for value in found.differences.values())
    for what, value in found.differences.items():
        print(f"losses differ by {value:.1e} at most over {what}; {NEAR:g} allowed")
    print(*lines_of(found), sep="\n")
    path = args.json or machine.results_file()
    found.write(path)
    print(f"\nresults: {path}")
    return 0 if same else 1
