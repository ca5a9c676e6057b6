"""What a run tells while it runs: lines on the terminal, metrics.jsonl, a picture of the loss."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
Record = dict[str, Any]


class Metrics:
    """A record for each step that is reported, one JSON object on each line of a file.

    A run that goes on from a checkpoint drops what was written after it: it comes again.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: bool = False) -> None:
        """step: the updates that are kept. ImportError when tensorboard is asked for and missing"""
        kept = [record for record in read(path) if record["step"] <= step] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1)
        for record in kept:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def add(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[Record]:
    """The whole records of a file; a line that was cut off by the end of a process is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Progress:
    """A line on stderr every few seconds: step, loss, tokens a second, time that is left."""

    def __init__(self, steps: int, silent: bool = False) -> None:
        self.steps, self.silent = steps, silent
        self._start = self._last = time.perf_counter()
        self._first_step: int | None = None

    def step(self, step: int, loss: float, rate: float, speed: float) -> None:
        """step updates are done."""
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step = step - 1
        if self.silent or (now - self._last < SECONDS_BETWEEN_LINES and step < self.steps):
            return
        self._last = now
        each = (now - self._start) / (step - self._first_step)
        self.say(
            f"step {step:>6}/{self.steps}  loss {loss:.4f}  rate {rate:.2e}  "
            f"{speed:,.0f} tokens/s  {clock(each * (self.steps - step))} left"
        )

    def say(self, line: str) -> None:
        if not self.silent:
            print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def draw(records: Sequence[Record], path: Path, lines: dict[str, float] | None = None) -> str:
    """The loss against the tokens read, as a picture; a sentence on what became of it.

    lines  losses of other models, each a horizontal line with its name
    """
    pyplot = plotting()
    if pyplot is None:
        return "no picture: matplotlib is not installed (pip install 'llmcore[train]')"
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(r["tokens"], r[name]) for r in records if name in r]
        if points:
            mark = {"linewidth": 0.8} if name == "loss" else {"marker": "o", "markersize": 3}
            axis.plot(*zip(*points, strict=True), label=label, **mark)
    for number, (name, value) in enumerate((lines or {}).items()):
        axis.axhline(value, label=name, linestyle="--", linewidth=1, color=f"C{number + 2}")
    axis.set_xlabel("tokens read")
    axis.set_ylabel("loss, nats a token")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture: {path}"


def plotting() -> Any:
    """matplotlib.pyplot, drawing into files; None where it isn't installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    return pyplot
