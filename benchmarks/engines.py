"""What runs a model token by token: llmcore's passes and Hugging Face's, by one interface.

Other libraries are in other_engines.py. Each engine is asked for the same jobs on the same ids.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcore import native
from llmcore.generate import generate
from llmcore.models import Decoder, KVCache
from llmcore.swap.decoder_trace import cache_argument

from . import timing

OURS, HUGGING_FACE, LLAMA_CPP, OTHERS = "llmcore", "Hugging Face", "llama.cpp", "other library"
"""Whose an engine is."""

WIDTHS = ("fp32", "bf16", "int8", "int4")
"""Of a weight; engines are compared with those of the same width."""


@dataclass(frozen=True)
class Job:
    """`passes` passes of `new` tokens for each of `batch` sequences, after `context` tokens."""

    name: str
    batch: int
    context: int
    new: int
    passes: int

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.batch * self.new

    @property
    def length(self) -> int:
        """Of a sequence at the end."""
        return self.context + self.new * self.passes

    @property
    def is_prefill(self) -> bool:
        return self.new > 1

    def ids(self, vocabulary: int) -> Tensor:
        """(B, length) int64, the same for everybody."""
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (self.batch, self.length), generator=draw)


class Engine(ABC):
    """A model in one library and one width."""

    name: str
    side: str
    width: str
    waited: float | None = None
    """The share of its last turn for which its threads waited for a core, where that is known."""

    @abstractmethod
    def prepare(self, job: Job, ids: Tensor) -> Tensor | None:
        """Get ready for a job: read the context. The last logits (B, V) of one pass, if it says."""

    @abstractmethod
    def seconds(self) -> float:
        """One turn of the job: seconds of a pass."""

    def close(self) -> None:  # noqa: B027  (most have nothing to give back)
        """Give back what the job needed."""

    def end(self) -> None:  # noqa: B027
        """Nobody asks any more."""


class Stepping(Engine):
    """An engine that makes one pass after the other, on ids that it is given."""

    job: Job
    pieces: list[Tensor]

    @abstractmethod
    def begin(self, job: Job) -> None:
        """An empty cache for this job."""

    @abstractmethod
    def step(self, ids: Tensor) -> Any:
        """A pass over ids (B, T)."""

    @abstractmethod
    def rewind(self) -> None:
        """Back to the job's context."""

    @abstractmethod
    def logits(self, result: Any) -> Tensor:
        """A pass's last logits (B, V), in float32."""

    def prepare(self, job: Job, ids: Tensor) -> Tensor | None:
        self.job = job
        self.pieces = [piece.contiguous() for piece in ids[:, job.context :].split(job.new, dim=1)]
        self.begin(job)
        if job.context:
            self.step(ids[:, : job.context].contiguous())
        logits = self.logits(self.step(self.pieces[0]))
        self.rewind()
        return logits

    def seconds(self) -> float:
        start = time.perf_counter()
        for piece in self.pieces:
            self.step(piece)
        taken = time.perf_counter() - start
        self.rewind()
        return taken / len(self.pieces)


class Llmcore(Stepping):
    """Passes as llmcore.generate makes them."""

    side = OURS

    def __init__(self, model: Decoder, width: str) -> None:
        self.model, self.width, self.name = model, width, f"llmcore {width}"
        self.cache: KVCache | None = None

    def begin(self, job: Job) -> None:
        self.cache = KVCache(self.model.config, job.batch, job.length)

    def step(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.cache, last_only=True)

    def rewind(self) -> None:
        assert self.cache is not None
        self.cache.truncate([self.job.context] * self.job.batch)

    def logits(self, result: Tensor) -> Tensor:
        return result[:, -1].float()

    def close(self) -> None:
        self.cache = None

    def bytes_of(self, job: Job) -> int:
        """What a pass must read: each weight once, and the keys and values of the context."""
        config = self.model.config
        cached = 2 * config.layers * config.kv_heads * config.head_width * 4
        return weight_bytes(self.model) + cached * job.context * job.batch

    def operations_of(self, job: Job) -> int:
        """Multiplications and additions of the layers' products; the head sees the last tokens."""
        sizes = {n: rows * columns for n, (rows, columns) in matrix_shapes(self.model).items()}
        head = sizes.pop("head", 0)
        embedding = sizes.pop("embedding")
        return 2 * job.batch * (job.new * sum(sizes.values()) + (head or embedding))

    def outside(self, tokens: int = 48, rounds: int = 5) -> tuple[float, float]:
        """Seconds of a token of llmcore.generate, and what of them is not the native call.

        Medians of some greedy calls after 32 tokens; reading these counts as a step. What the
        native call does besides its kernels is not in it.
        """
        ids = Job("", 1, 31, 1, 1).ids(self.model.config.vocab_size)
        steps, outsides = [], []
        for _ in range(rounds + 1):
            with native_seconds() as calls:
                start = time.perf_counter()
                generate(self.model, ids, max_new_tokens=tokens, stop=())
                seconds = time.perf_counter() - start
            outsides.append((seconds - sum(calls)) / len(calls))
            steps.append((seconds - calls[0]) / (len(calls) - 1))
        return timing.quantile(steps[1:], 0.5), timing.quantile(outsides[1:], 0.5)


def matrix_shapes(model: Decoder) -> dict[str, tuple[int, int]]:
    """Of the weights that may be packed."""
    found = {}
    for name, module in model.named_modules():
        shape: tuple[int, ...] = getattr(getattr(module, "weight", None), "shape", ())
        if len(shape) == 2 and name != "position_embedding":
            found[name] = (shape[0], shape[1])
    return found


def weight_bytes(model: Decoder) -> int:
    """What a pass reads of the matrices; of an embedding that is no head, next to nothing."""
    total = 0
    for name, module in model.named_modules():
        if name not in matrix_shapes(model) or (name == "embedding" and model.head is not None):
            continue
        weight: Any = module.weight
        parts = [weight] if isinstance(weight, Tensor) else [weight.values, weight.scales]
        parts += [getattr(weight, "minimums", None)]
        total += sum(part.nbytes for part in parts if part is not None)
    return total


class HuggingFace(Stepping):
    """transformers' LlamaForCausalLM: eager with a growing cache, or compiled with a static one."""

    side = HUGGING_FACE

    def __init__(self, stock: Any, width: str, *, compiled: bool = False) -> None:
        kind = "compiled, static cache" if compiled else "eager"
        self.stock, self.width, self.name = stock, width, f"HF {kind} {width}"
        self.forward = torch.compile(stock.forward, dynamic=False) if compiled else stock.forward
        self.compiled = compiled
        self.cache: Any = None

    def begin(self, job: Job) -> None:
        import transformers

        config = self.stock.config
        if self.compiled:
            self.cache = transformers.StaticCache(config, max_cache_len=job.length)
            # Its buffers are made outside of the graph, by a pass that isn't compiled.
            self.run(self.stock.forward, torch.zeros(job.batch, 1, dtype=torch.int64))
            self.cache.reset()
        else:
            self.cache = transformers.DynamicCache(config=config)

    def run(self, forward: Any, ids: Tensor) -> Any:
        cache = {cache_argument(self.stock): self.cache}
        return forward(ids, use_cache=True, logits_to_keep=1, **cache)

    def step(self, ids: Tensor) -> Any:
        is_context = self.compiled and ids.shape[1] == self.job.context > self.job.new
        return self.run(self.stock.forward if is_context else self.forward, ids)

    def rewind(self) -> None:
        if self.compiled:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.job.context)
        elif self.job.context:
            # Negative: how many tokens to drop.
            self.cache.crop(self.job.context - self.cache.get_seq_length())
        else:
            self.begin(self.job)

    def logits(self, result: Any) -> Tensor:
        return result.logits[:, -1].float()

    def close(self) -> None:
        self.cache = None
        if self.compiled:
            torch._dynamo.reset()


@contextlib.contextmanager
def native_seconds() -> Iterator[list[float]]:
    """Inside: the seconds of each of the native calls that passes make."""
    assert native.module is not None
    plan, found = native.module.DecoderPlan, []
    original = plan.forward

    def timed(self: Any, **arguments: Any) -> None:
        start = time.perf_counter()
        original(self, **arguments)
        found.append(time.perf_counter() - start)

    plan.forward = timed
    try:
        yield found
    finally:
        plan.forward = original
