"""What a pool says of itself: plain data with a JSON form."""

from __future__ import annotations

from fibkv.contract import Contract, Total
from fibkv.ladder import Rung
from fibkv.pressure import PressureState


class RungStats(Contract):
    """The pages at one rung.

    Attributes:
        rung: None = pages of caches that are on no ladder.
        pages: distinct ones.
        nbytes: of their codes and metadata.
    """

    rung: Rung | None
    pages: Total
    nbytes: Total


class PoolStats(Contract):
    """A pool at one moment.

    Attributes:
        budget: bytes; None = there is none.
        allocated: bytes that exist: pages, metadata, page tables, tails with their unused room, tables, slack.
        slack: those of them that belong to nothing: parts of memory pages beside and between pages.
        peak: the most that was ever allocated.
        claimed: bytes set aside for steps under way.
        tables: bytes of the codecs' tables, which all caches of the process share.
        rungs: pages by rung, from the least to the most compact.
        shared_pages: how often a page was sealed that was there already.
        layers: caches of single layers that there are.
        pressure: state of the controller; None without a budget.
        recoded_pages: pages that were re-encoded.
        recoding_seconds: time that took, over all threads.
        longest_step_seconds: the longest time that one step spent on bringing pressure down.
        refusals: steps that did not fit.
        damaged_pages: pages that were to be re-encoded and did not match their digests; they were left as they are.
    """

    budget: Total | None
    allocated: Total
    slack: Total
    peak: Total
    claimed: Total
    tables: Total
    rungs: tuple[RungStats, ...]
    shared_pages: Total
    layers: Total
    pressure: PressureState | None
    recoded_pages: Total
    recoding_seconds: float
    longest_step_seconds: float
    refusals: Total
    damaged_pages: Total

    @property
    def occupancy(self) -> float | None:
        """Allocated bytes over the budget; None without one."""
        return None if self.budget is None else self.allocated / self.budget
