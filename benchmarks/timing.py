"""Times contenders in turn, round by round: what else the machine does meets all of them alike."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One call to be timed, inside a context that is entered once for each of its turns."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Plan:
    """How long to time, in seconds, and how many rounds that may be.

    A turn is as many calls as fit into `turn`, at least one; `total` is for all contenders.
    """

    warm_up: float = 0.05
    turn: float = 0.004
    total: float = 2.0
    fewest_rounds: int = 7
    most_rounds: int = 100


TABLE = Plan(total=0.8, fewest_rounds=3, most_rounds=60)
"""A few seconds for a case, so that a long list of them stays below a quarter of an hour."""

LONG = 2.0
"""Seconds of a call that is warm after one."""

QUICK = Plan(warm_up=0.02, turn=0.003, total=0.6, fewest_rounds=5, most_rounds=60)


@dataclass(frozen=True)
class Timing:
    """Seconds for each call, one mean for each round of `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quantile(self.seconds, 0.25), quantile(self.seconds, 0.75)


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which the share q of the values lies, interpolated between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def turns(count: int, round_number: int) -> list[int]:
    """The order of a round: each contender once, shuffled: nobody always follows the same one."""
    order = list(range(count))
    random.Random(round_number).shuffle(order)
    return order


def calls_in(turn: float, seconds: float) -> int:
    """How many calls of `seconds` each fit into a turn; at least one."""
    return max(1, int(turn / max(seconds, 1e-9)))


def rounds_in(plan: Plan, seconds: float) -> int:
    """How many rounds of `seconds` each the plan allows."""
    fitting = int(plan.total / max(seconds, 1e-9))
    return min(max(fitting, plan.fewest_rounds), plan.most_rounds)


def warm_up(contender: Contender, plan: Plan, clock: Clock) -> float:
    """Calls for the plan's time, at least twice unless one takes long; seconds of the fastest."""
    fastest, begin, calls = float("inf"), clock(), 0
    with contender.context():
        while calls < 1 or (calls < 2 and fastest < LONG) or clock() - begin < plan.warm_up:
            start = clock()
            contender.call()
            fastest = min(fastest, clock() - start)
            calls += 1
    return fastest


def take_turn(contender: Contender, calls: int, settle: bool, clock: Clock) -> float:
    """Seconds for each of `calls` calls in a row.

    With `settle` one more goes before them, untimed: the caches then hold its data, not others'.
    """
    with contender.context():
        if settle:
            contender.call()
        start = clock()
        for _ in range(calls):
            contender.call()
        return (clock() - start) / calls


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside, as in timeit."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    contenders: Sequence[Contender], plan: Plan, clock: Clock = time.perf_counter
) -> list[Timing]:
    """One timing for each contender, in their order."""
    with no_collection():
        fastest = [warm_up(c, plan, clock) for c in contenders]
        calls = [calls_in(plan.turn, seconds) for seconds in fastest]
        settles = [seconds < plan.turn for seconds in fastest]
        one_round = sum((n + s) * t for n, s, t in zip(calls, settles, fastest, strict=True))
        seconds: list[list[float]] = [[] for _ in contenders]
        for number in range(rounds_in(plan, one_round)):
            for i in turns(len(contenders), number):
                seconds[i].append(take_turn(contenders[i], calls[i], settles[i], clock))
    return [Timing(tuple(s), n) for s, n in zip(seconds, calls, strict=True)]
