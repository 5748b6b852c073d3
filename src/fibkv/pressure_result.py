"""What the demonstration of memory pressure does and finds: plain data with a JSON form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fibkv.contract import Contract, Count, Total
from fibkv.pool_stats import PoolStats
from fibkv.quality_result import PoisonOutcome


class PressureSettings(Contract):
    """Sequences that arrive into a pool.

    Attributes:
        sequences: that arrive.
        fits: how many of them the budget holds at 16 bits.
        prompt_tokens: that each brings.
        new_tokens: that each then takes one by one, so that its past is read through its pages.
        arrivals: per tick; in a tick every live sequence takes one token.
        waits: whether a sequence that does not fit waits for others to finish; else it is refused.
        num_threads: CPU threads of torch.
        seed: of the places of the sequences in the text.
    """

    sequences: Count = 64
    fits: Count = 16
    prompt_tokens: Count = 896
    new_tokens: Count = 128
    arrivals: Annotated[float, Field(gt=0, le=16)] = 1.0
    waits: bool = True
    num_threads: Count = 1
    seed: Total = 0

    @property
    def tokens(self) -> int:
        """Tokens of a finished sequence."""
        return self.prompt_tokens + self.new_tokens


class Tick(Contract):
    """The pool after one tick.

    Attributes:
        tick: its number.
        seconds: since the start.
        live: sequences that hold a cache.
        waiting: that have arrived and hold none.
        finished: so far.
        refused: so far.
        stalled: live ones that did not get their token in this tick.
        process_nbytes: anonymous memory of the process, as the kernel counts it; 0 where it does not.
        pool: its state.
    """

    tick: Total
    seconds: float
    live: Total
    waiting: Total
    finished: Total
    refused: Total
    stalled: Total
    process_nbytes: Total
    pool: PoolStats


class SequenceRow(Contract):
    """What became of one sequence.

    Attributes:
        index: in the order of arrival.
        finished: whether it got all of its tokens.
        kl: mean KL(dense || pool) of its new tokens in nats; None if it was refused.
        top1: share of its new tokens whose arg max is that of the dense model; None if it was refused.
        materialized: dense copies that were made of its pages.
    """

    index: Total
    finished: bool
    kl: float | None
    top1: float | None
    materialized: Total


class PressureResult(Contract):
    """One run.

    Attributes:
        model: its name.
        settings: of the run.
        budget: bytes.
        page_nbytes: of a page at 16 bits, in one layer.
        layers: that are compressed.
        sequences: one by one.
        ticks: one by one.
        step_seconds: median time of a step of one sequence.
        seconds: duration of the run.
        poison: the poison test on the last sequence that finished; None if none did.
    """

    model: str
    settings: PressureSettings
    budget: Total
    page_nbytes: Total
    layers: Count
    sequences: tuple[SequenceRow, ...]
    ticks: tuple[Tick, ...]
    step_seconds: float
    seconds: float
    poison: PoisonOutcome | None

    @property
    def finished(self) -> int:
        """Sequences that got all of their tokens."""
        return sum(row.finished for row in self.sequences)

    @property
    def peak(self) -> int:
        """The most bytes that the pool ever held."""
        return self.ticks[-1].pool.peak

    @property
    def kl(self) -> float:
        """Mean KL over the finished sequences; 0 if none has finished."""
        kls = [row.kl for row in self.sequences if row.kl is not None]
        return sum(kls) / len(kls) if kls else 0.0

    @property
    def passed(self) -> bool:
        """Whether the budget held to one page per layer, pages were read, in place, and none was lost while waiting."""
        within = self.peak <= self.budget + self.layers * self.page_nbytes
        in_place = all(row.materialized == 0 for row in self.sequences)
        is_read = self.finished == 0 or (self.poison is not None and self.poison.passed)
        return within and in_place and is_read and (not self.settings.waits or self.finished == self.settings.sequences)
