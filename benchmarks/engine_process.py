"""An engine in a process of its own, which sleeps while others have their turns.

In one process libraries disturb each other even when they do nothing: GNU's OpenMP lets its threads
wait awake between two parallel regions, but puts them to sleep at once as soon as all libraries
together have more of them than there are cores; others keep threads that spin. What a turn then
measures is the company that an engine is in.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from . import timing
from .engines import Engine, Job
from .waiting import Waiting, is_disturbed

REST = 0.02
"""Seconds after a turn: threads spin for some milliseconds behind their work."""

TRIES = 3
"""How often a disturbed turn is taken at most; the least disturbed one counts."""


class Refused(RuntimeError):
    """What went wrong in the engine's process, as `reason` says it."""


def reason(error: Exception) -> str:
    text = str(error).strip().partition(chr(10))[0]
    return text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"


class Hosted(Engine):
    """What `make` gives, in another process; `make` must be one that can be pickled."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, make, torch.get_num_threads()), daemon=True
        )
        self.process.start()
        theirs.close()
        self.name, self.side, self.width = self.answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the engine."""
        self.pipe.send((method, arguments))
        return self.answer()

    def answer(self) -> Any:
        try:
            ok, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise Refused(f"its process ended with status {self.process.exitcode}") from None
        if not ok:
            raise Refused(result)
        return result

    def prepare(self, job: Job, ids: Tensor) -> Tensor | None:
        logits = self.ask("prepare", job, ids.numpy())
        time.sleep(REST)
        return None if logits is None else torch.from_numpy(logits)

    def seconds(self) -> float:
        found: list[tuple[float | None, float]] = []
        while not found or (is_disturbed(found[-1][0]) and len(found) < TRIES):
            found.append(self.ask("seconds"))
            time.sleep(REST)
        self.waited, seconds = min(found, key=lambda turn: turn[0] or 0.0)
        return seconds

    def bytes_of(self, job: Job) -> int:
        count: int = self.ask("bytes_of", job)
        return count

    def operations_of(self, job: Job) -> int:
        count: int = self.ask("operations_of", job)
        return count

    def outside(self) -> tuple[float, float]:
        found: tuple[float, float] = self.ask("outside")
        return found

    def close(self) -> None:
        if self.process.is_alive():
            self.ask("close")

    def end(self) -> None:
        """Ends the process, by force when it takes longer than it should."""
        self.pipe.close()
        self.process.join(5)
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection, make: Callable[[], Engine], threads: int) -> None:
    """The other process: makes the engine, then answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends with who asks
    torch.set_num_threads(threads)
    try:
        engine = make()
    except Exception as error:
        pipe.send((False, reason(error)))
        return
    pipe.send((True, (engine.name, engine.side, engine.width)))
    with torch.no_grad(), timing.no_collection(), contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            try:
                result = (True, call(engine, method, arguments))
            except Exception as error:
                result = (False, reason(error))
            pipe.send(result)


def call(engine: Engine, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "prepare":
        job, ids = arguments
        logits = engine.prepare(job, torch.from_numpy(ids))
        return None if logits is None else logits.numpy()
    if method == "seconds":
        waiting = Waiting()
        seconds = engine.seconds()
        return waiting.share(), seconds
    return getattr(engine, method)(*arguments)
