"""What the benchmarks are asked for and what they find: plain data with a JSON form.

Figures stand behind checks: a row whose checks failed has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from fibkv.bench_settings import KernelSettings, PrefillSettings, StepSettings
from fibkv.contract import Contract, Count, Total
from fibkv.machine import Conditions
from fibkv.quality_result import PoisonOutcome
from fibkv.timing import Timing

ATTENTION_LIMIT = 0.03
"""Relative error up to which one step's attention is right: twice what 8-bit arithmetic in a kernel costs. An output
that has nothing to do with the right one, or is zero, has 1 and more."""
LOGITS_LIMIT = 0.1
"""The same of a whole model's logits: in bfloat16 random weights turn another order of sums into 0.015 over 4 layers,
0.025 over 16. Forgetting half of the cache makes it 0.9."""


class Checks(Contract):
    """What was made sure of before a row was timed.

    Attributes:
        error: |output - expected| / |expected| in the 2-norm, the largest of all outputs seen; expected is a dense
            computation on the dequantized values.
        limit: up to which the error is that of rounding.
        poison: what damage to some keys in memory did to the output.
        materialized: dense copies that attention made instead of reading pages.
    """

    error: float
    limit: float
    poison: PoisonOutcome
    materialized: Total = 0

    @property
    def passed(self) -> bool:
        """Whether the output is right and depends on the pages."""
        return self.error <= self.limit and self.poison.passed and self.materialized == 0

    @classmethod
    def worst(cls, checks: Sequence[Checks]) -> Self:
        """The worst of several outcomes, field by field."""
        moved = min(one.poison.moved for one in checks)
        restored = all(one.poison.restored for one in checks)
        return cls(
            error=max(one.error for one in checks),
            limit=min(one.limit for one in checks),
            poison=PoisonOutcome(moved=moved, restored=restored),
            materialized=sum(one.materialized for one in checks),
        )


class KernelFigures(Contract):
    """How fast one contender is at one context.

    Attributes:
        timing: seconds per call.
        read: seconds per pure read of as many bytes, in the same rounds.
        ns_per_token: median nanoseconds per token and KV head (keys and values).
        gigabytes_per_second: stored bytes over the median.
        speedup: over the strongest baseline of the same run and context, median of per-round ratios; None where no
            baseline passed its checks.
        of_read: time of the pure read over the contender's, median of per-round ratios: 1 is memory speed.
    """

    timing: Timing
    read: Timing
    ns_per_token: float
    gigabytes_per_second: float
    speedup: float | None
    of_read: float


class KernelRow(Contract):
    """One contender at one context.

    Attributes:
        name: of the contender.
        kind: a torch baseline on dense bfloat16, or attention on compressed pages.
        context: cached tokens.
        nbytes: stored bytes of keys and values: codes, scales, raw windows with their slack, page metadata.
        bytes_per_element: the same over elements.
        checks: their outcome.
        figures: None if the checks failed.
    """

    name: str
    kind: Literal["baseline", "fibkv"]
    context: Count
    nbytes: Total
    bytes_per_element: float
    checks: Checks
    figures: KernelFigures | None


class KernelResult(Contract):
    """All figures of one run of `fibkv bench kernels`.

    Attributes:
        settings: what was asked for.
        conditions: machine, software, load.
        cache_bytes: that were read before an operand came up again.
        read_methods: what the pure read is, for each number of bytes.
        rows: context by context, baselines first.
        seconds: duration of the run.
    """

    settings: KernelSettings
    conditions: Conditions
    cache_bytes: Total
    read_methods: tuple[tuple[int, str], ...]
    rows: tuple[KernelRow, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every contender passed its checks."""
        return all(row.checks.passed for row in self.rows)


class CacheFigures(Contract):
    """How fast a model is with one cache.

    Attributes:
        timing: seconds per decoded token, or per prompt.
        tokens_per_second: over the mean, so that rare slow steps (sealing, re-quantizing) count.
        speedup: over the strongest baseline of the same run, median of per-round ratios; None where no baseline
            passed its checks.
    """

    timing: Timing
    tokens_per_second: float
    speedup: float | None
    overhead: float | None


class CacheRow(Contract):
    """One cache under a whole model.

    Attributes:
        name: of the contender.
        kind: stock caches of transformers, dense or quantized, which are the baselines; or fibkv's.
        nbytes: that the cache holds: counted by its report, or the bytes of a stock cache's tensors.
        of_dense: the same over those of dense bfloat16 keys and values.
        checks: their outcome; None for a stock cache under stock attention, which is taken as it is.
        figures: None if the checks failed.
    """

    name: str
    kind: Literal["dense", "quantized", "fibkv"]
    nbytes: Total
    of_dense: float
    checks: Checks | None
    figures: CacheFigures | None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return self.checks is None or self.checks.passed


class ModelResult(Contract):
    """All figures of one run under a whole model.

    Attributes:
        conditions: machine, software, load.
        rows: stock caches first.
        skipped: stock caches that could not be made, each with the reason.
        seconds: duration of the run.
    """

    conditions: Conditions
    rows: tuple[CacheRow, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every contender passed its checks."""
        return all(row.passed for row in self.rows)


class StepResult(ModelResult):
    """One run of `fibkv bench steps`.

    Attributes:
        settings: what was asked for.
        cache_bytes: that were read between two steps.
    """

    settings: StepSettings
    cache_bytes: Total


class PrefillResult(ModelResult):
    """One run of `fibkv bench prefill`; its settings say what was asked for."""

    settings: PrefillSettings
