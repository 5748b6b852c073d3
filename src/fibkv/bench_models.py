"""What the benchmarks of a whole model share: trials of caches, their checks, and rows from their rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from fibkv.bench_caches import CacheContender, held_nbytes
from fibkv.bench_forms import DenseForm
from fibkv.bench_result import LOGITS_LIMIT, CacheFigures, CacheRow, Checks
from fibkv.bench_settings import ModelSettings
from fibkv.hf import Cache
from fibkv.hf_switch import switched
from fibkv.metrics import relative_error
from fibkv.quality import CausalLM, fork_logits, poison_filled, poison_outcome
from fibkv.quality_result import PoisonOutcome
from fibkv.timing import Rounds, Timing, interleave, ratio, strongest

TOKEN = torch.zeros(1, dtype=torch.long)
"""The token [1] that is fed to a filled cache when it is checked."""


class Trial(ABC):
    """One cache under the model, with what its checks and its rounds give.

    Attributes:
        model: the model.
        settings: of the run.
        contender: the cache.
        checks: None for a quantized cache of transformers, which is taken as it is.
        nbytes: that the cache held when `measure` last saw it.
        of_dense: the same over those of dense bfloat16 keys and values.
    """

    checks: Checks | None = None
    nbytes: int
    of_dense: float

    def __init__(self, model: CausalLM, settings: ModelSettings, contender: CacheContender) -> None:
        self.model = model
        self.settings = settings
        self.contender = contender

    @abstractmethod
    def turn(self) -> list[float]:
        """Takes a turn in a round; returns the seconds of its calls."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return self.checks is None or self.checks.passed

    def check(self, cache: Any, logits: Tensor, expected: Tensor) -> None:
        """Checks a filled cache, which is left as it was.

        Args:
            cache: of the contender.
            logits: that the model gave with it, [vocab].
            expected: what dense attention on the same values gives, [vocab].
        """
        if self.contender.kind != "quantized":
            error = relative_error(logits, expected)
            self.checks = Checks(error=error, limit=LOGITS_LIMIT, poison=self._poison(cache))

    def measure(self, cache: Any) -> None:
        """Notes the bytes that a cache holds, and the dense copies that attention made of its pages."""
        used = self.settings
        self.nbytes = held_nbytes(cache)
        # Keys and values, two bytes each.
        dense = 4 * used.layers * used.kv_heads * used.head_dim * cache.get_seq_length()
        self.of_dense = self.nbytes / dense
        if self.checks is not None and isinstance(cache, Cache):
            self.checks = self.checks.model_copy(update={"materialized": cache.report().materialized})

    def _poison(self, cache: Any) -> PoisonOutcome:
        with switched(self.model, self.contender.attention):
            if isinstance(cache, Cache):
                return poison_filled(self.model, cache, TOKEN)
            intact = fork_logits(self.model, cache, TOKEN)
            with DenseForm(cache.layers[0].keys, cache.layers[0].values).damaged():
                damaged = fork_logits(self.model, cache, TOKEN)
            return poison_outcome(intact, damaged, fork_logits(self.model, cache, TOKEN))


def rounds_of(trials: Sequence[Trial], num_rounds: int, say: Callable[[str], None]) -> dict[str, list[list[float]]]:
    """Seconds by name of the trials that passed their checks; the others are not timed."""
    turns = {trial.contender.name: trial.turn for trial in trials if trial.passed}
    return interleave(turns, num_rounds, lambda index: say(f"round {index + 1} of {num_rounds}"))


def rows_of(
    trials: Sequence[Trial], rounds: dict[str, list[list[float]]], tokens_per_call: int, baselines: Set[str]
) -> tuple[CacheRow, ...]:
    """A row for each trial, with figures for those that pass their checks at the end, too.

    Args:
        trials: of the run, measured.
        rounds: seconds by name.
        tokens_per_call: of what was timed.
        baselines: kinds of rows of which the fastest is what all are compared with.
    """
    yardstick = strongest(
        [rounds[trial.contender.name] for trial in trials if trial.passed and trial.contender.kind in baselines]
    )
    return tuple(
        CacheRow(
            name=trial.contender.name,
            kind=trial.contender.kind,
            nbytes=trial.nbytes,
            of_dense=trial.of_dense,
            checks=trial.checks,
            figures=_figures(rounds[trial.contender.name], yardstick, tokens_per_call) if trial.passed else None,
        )
        for trial in trials
    )


def _figures(rounds: Rounds, yardstick: Rounds | None, tokens_per_call: int) -> CacheFigures:
    timing = Timing.of(rounds)
    return CacheFigures(
        timing=timing,
        tokens_per_second=tokens_per_call / timing.mean,
        speedup=None if yardstick is None else ratio(yardstick, rounds),
        overhead=None if yardstick is None else ratio(rounds, yardstick) - 1,
    )
