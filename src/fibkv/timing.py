"""Timing side by side: contenders take turns in every round, and are compared round by round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from statistics import median
from typing import Self

import numpy as np

from fibkv.contract import Contract, Count

Rounds = Sequence[Sequence[float]]
"""Seconds of one contender's calls, round by round; every round has at least one call."""


class Timing(Contract):
    """Seconds per call over all rounds.

    Attributes:
        median: half of the calls were faster.
        p10: one call in ten was faster: what the machine does when nothing gets in the way.
        p90: one call in ten was slower.
        mean: the whole time over the calls, rare slow ones included.
        calls: how many were timed.
    """

    median: float
    p10: float
    p90: float
    mean: float
    calls: Count

    @classmethod
    def of(cls, rounds: Rounds) -> Self:
        """The summary of one contender's calls; quantiles are interpolated linearly."""
        calls = [seconds for taken in rounds for seconds in taken]
        p10, half, p90 = (float(value) for value in np.quantile(calls, (0.1, 0.5, 0.9)))
        return cls(median=half, p10=p10, p90=p90, mean=float(np.mean(calls)), calls=len(calls))


def ratio(numerator: Rounds, denominator: Rounds) -> float:
    """Median over rounds of the ratio of the two medians of that round.

    Both were taken within one round, so that a busy minute of the machine slows both and leaves the ratio alone.
    """
    return median(median(over) / median(under) for over, under in zip(numerator, denominator, strict=True))


def strongest(baselines: Sequence[Rounds]) -> Rounds | None:
    """The fastest of several contenders by per-round ratios, as they are compared with it; None if there is none."""
    return max(baselines, key=lambda rounds: ratio(baselines[0], rounds), default=None)


def interleave(
    contenders: Mapping[str, Callable[[], Sequence[float]]],
    num_rounds: int,
    before_round: Callable[[int], None],
) -> dict[str, list[list[float]]]:
    """Lets every contender take its turn in each round.

    The order of each round is drawn anew, and is the same in every run: what a turn leaves behind in caches and in the
    states of threads falls on each of the others alike.

    Args:
        contenders: by name what takes a turn and returns the seconds of its calls.
        num_rounds: how many rounds.
        before_round: told the round that comes next, counted from 0.

    Returns:
        By name the seconds, round by round.
    """
    order, draw = list(contenders), Random(0)
    taken: dict[str, list[list[float]]] = {name: [] for name in order}
    with _no_garbage_collection():
        for index in range(num_rounds):
            before_round(index)
            draw.shuffle(order)
            for name in order:
                taken[name].append(list(contenders[name]()))
    return taken


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection looks at every object of every cache: it would take longer than the call that it falls into."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
