"""The training loop: the same for every model, objective and number of processes.

    gradient = d/dw  sum of losses over all targets of a step / number of those targets
    AdamW's update with it, its norm clipped, at the step's learning rate

A step's result depends on nothing but the weights, AdamW's moments and the step's number: it says
which batches are read and how dropout is seeded. So a run that is stopped and goes on gets the same
bits as one that isn't, and several processes take the same steps as one.
"""

import contextlib
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmcore.text.data import Batch
from llmcore.train.checkpoint import Checkpoint, found_in
from llmcore.train.metrics import Metrics, Progress
from llmcore.train.processes import Processes, as_float, gathered, placed
from llmcore.train.recipe import Recipe

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"


class Data(Protocol):
    """Batches by their number."""

    def batch(self, position: int) -> Batch: ...


@dataclass(frozen=True)
class Validation:
    """The first `batches` of other data, each `every` steps and at the end."""

    data: Data
    batches: int
    every: int


class Interrupted(Exception):
    """Somebody pressed Ctrl-C; a checkpoint of where the run stood is written."""


class Trainer:
    """Trains `objective.model`, whose loss summed over a batch's targets is objective(**inputs).

    folder            of the run: metrics.jsonl and checkpoints/; a run that was stopped there goes
                      on where its last checkpoint is
    checkpoint_every  steps; 0: only at the end, and on Ctrl-C
    describe          adds to a checkpoint what says which model it is
    """

    def __init__(
        self,
        objective: nn.Module,
        data: Data,
        recipe: Recipe,
        folder: Path,
        *,
        validation: Validation | None = None,
        checkpoint_every: int = 0,
        describe: Callable[[Path], object] | None = None,
        processes: Processes | None = None,
        quiet: bool = False,
        tensorboard: bool = False,
    ) -> None:
        """ValueError when the recipe can't be spread over the processes."""
        self.processes = processes or Processes()
        if recipe.accumulate % self.processes.count:
            raise ValueError(
                f"accumulate must be a multiple of the {self.processes.count} processes, "
                f"got {recipe.accumulate}"
            )
        self.data, self.recipe, self.folder = data, recipe, folder
        self.validation, self.describe = validation, describe
        self.checkpoint_every, self.tensorboard = checkpoint_every, tensorboard
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.spread = self.processes.spread(objective)
        self.optimizer = _adamw(self.model, recipe)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.average: dict[str, Tensor] | None = None
        if recipe.average is not None:
            self.average = {name: p.detach().clone() for name, p in self._parameters()}
        self.progress = Progress(recipe.steps, quiet or not self.processes.is_first)

    def run(self) -> None:
        """All steps that are left. The model then holds the result: the average where there is one.

        Interrupted after Ctrl-C (a second one stops at once), FloatingPointError when the loss is
        no number any more; the last checkpoint is then there to go on from. ValueError when the
        folder holds a run of another recipe.
        """
        self.resume()
        path = self.folder / METRICS_FILE
        first = self.processes.is_first
        metrics = Metrics(path, self.step, self.tensorboard) if first else None
        self.spread.train()
        try:
            with Interrupt() as interrupt:
                while self.step < self.recipe.steps:
                    record = self._timed_step()
                    if self._is_due(self.validation.every if self.validation else 0):
                        record["validation_loss"] = self.validate()
                        self.progress.say(f"validation loss {record['validation_loss']:.4f}")
                    if metrics is not None:
                        metrics.add(record)
                    stop = self.processes.any(interrupt.asked)
                    if stop or self._is_due(self.checkpoint_every):
                        self.save()
                    if stop and self.step < self.recipe.steps:
                        raise Interrupted(f"stopped behind step {self.step}")
                self.save()
        finally:
            if metrics is not None:
                metrics.close()
            self.spread.eval()
        if self.average is not None:
            self._exchange(self.average)

    @torch.no_grad()
    def validate(self) -> float:
        """Nats a target over the validation's batches."""
        assert self.validation is not None
        rank, count = self.processes.rank, self.processes.count
        training = self.spread.training
        self.spread.eval()
        total, targets = 0.0, 0
        with self._averaged():
            # All processes go through equally many batches, as gathering weights needs.
            for start in range(0, self.validation.batches, count):
                number = min(start + rank, self.validation.batches - 1)
                batch = self.validation.data.batch(number)
                with self._precision():
                    loss = float(self.spread(**batch.inputs))
                if start + rank == number:
                    total, targets = total + loss, targets + batch.targets
            self.processes.reshard(self.spread)
        self.spread.train(training)
        return self.processes.sum(total) / self.processes.sum(targets)

    def save(self) -> None:
        """A checkpoint of where the run stands."""
        weights = {name: gathered(t).detach() for name, t in self.model.state_dict().items()}
        moments = {
            f"{name}:{which}": gathered(self.optimizer.state[parameter][which])
            for name, parameter in self._parameters()
            for which in MOMENTS
        }
        average = None
        if self.average is not None:
            average = {name: gathered(tensor) for name, tensor in self.average.items()}
        if self.processes.is_first:
            state = {
                "recipe": dataclasses.asdict(self.recipe),
                "tokens": self.tokens,
                "seconds": self.seconds,
            }
            checkpoint = Checkpoint(self.step, weights, moments, average, state)
            checkpoint.write(self.folder / CHECKPOINTS, self.describe)
        self.processes.wait()

    def resume(self) -> bool:
        """Take up the last checkpoint, if there is one; whether there was."""
        found = found_in(self.folder / CHECKPOINTS)
        if not found:
            return False
        checkpoint = Checkpoint.read(found[-1])
        _check_same(self.recipe, checkpoint.state["recipe"], self.folder)
        own = self.model.state_dict()
        if own.keys() != checkpoint.weights.keys():
            raise ValueError(f"{found[-1]} is of another model: its weights have other names")
        for name, tensor in own.items():
            tensor.copy_(placed(checkpoint.weights[name], tensor))
        for name, parameter in self._parameters():
            moments = {which: checkpoint.optimizer[f"{name}:{which}"] for which in MOMENTS}
            self.optimizer.state[parameter] = {
                which: value.clone() if which == "step" else placed(value, parameter.detach())
                for which, value in moments.items()
            }
        if self.average is not None:
            assert checkpoint.average is not None  # the recipe is the same
            for name, tensor in self.average.items():
                tensor.copy_(placed(checkpoint.average[name], tensor))
        self.step = checkpoint.step
        self.tokens, self.seconds = checkpoint.state["tokens"], checkpoint.state["seconds"]
        self.progress.say(f"going on behind step {self.step}")
        return True

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.recipe.steps)

    def _timed_step(self) -> dict[str, Any]:
        start, rate = time.perf_counter(), self.recipe.rate(self.step)
        loss, norm, tokens = self._take_step(rate)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss}")
        seconds = time.perf_counter() - start
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.seconds += seconds
        speed = tokens / seconds
        self.progress.step(self.step, loss, rate, speed)
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": self.tokens,
            "tokens_per_second": round(speed, 1),
        }

    def _take_step(self, rate: float) -> tuple[float, float, int]:
        """One update; loss in nats a target, norm of the gradient, tokens read by all processes."""
        share = self.recipe.accumulate // self.processes.count
        first = self.step * self.recipe.accumulate + self.processes.rank * share
        batches = [self.data.batch(first + i) for i in range(share)]
        targets = self.processes.sum(sum(batch.targets for batch in batches))
        scale = self.processes.count / targets  # gradients come out as means over the processes
        total = 0.0
        for i, batch in enumerate(batches):
            torch.manual_seed(_seed(self.recipe.seed, first + i))
            with self.processes.passing(self.spread, i == share - 1):
                with self._precision():
                    loss = self.spread(**batch.inputs)
                (loss * scale).backward()
            total += float(loss.detach())
        clip = self.recipe.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if clip is None else clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self._update_average(self.average)
        tokens = self.processes.sum(sum(batch.tokens for batch in batches))
        return self.processes.sum(total) / targets, as_float(norm), int(tokens)

    @torch.no_grad()
    def _update_average(self, average: dict[str, Tensor]) -> None:
        assert self.recipe.average is not None
        for name, parameter in self._parameters():
            average[name].lerp_(parameter, 1.0 - self.recipe.average)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has its averaged weights, where there are any, inside."""
        if self.average is None:
            yield
            return
        self._exchange(self.average)
        try:
            yield
        finally:
            self._exchange(self.average)

    @torch.no_grad()
    def _exchange(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            before = parameter.clone()
            parameter.copy_(tensors[name])
            tensors[name].copy_(before)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())


class Interrupt:
    """Inside, Ctrl-C (or a polite kill) asks for an end; a second one is as ever."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


def _adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """torch's fused AdamW; weight decay for matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=recipe.eps, fused=True)


def _seed(seed: int, position: int) -> int:
    """Of dropout in a batch: any two are unrelated."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_same(recipe: Recipe, found: dict[str, Any], folder: Path) -> None:
    for name, value in dataclasses.asdict(recipe).items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {found.get(name)}, this one has {value}: "
                "take its settings, or another folder"
            )
