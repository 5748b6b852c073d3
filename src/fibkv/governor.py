"""The governor: measured bytes over a budget, the level that they call for, and pages re-encoded until they fit.

Two duties. *Keeping pressure down*: once per step of any cache it observes the occupancy and, above the threshold of
the level that it is at, re-encodes a bounded number of pages, oldest first. *Keeping the budget*: before a step it is
asked for the bytes that the step takes; if they are not there it re-encodes as many pages as it needs, and refuses,
before anything is changed, where even the last rung does not make room.

It does not hunt. Re-encoding stops just under the threshold that was crossed, which is above the point where the level
falls, so only bytes that leave (finished sequences, crops) let it fall; and what is compressed stays compressed, so
only new bytes let it rise again. `docs/POOL.md` has the bound.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from fibkv.errors import BudgetError, DigestMismatch, EncodingError
from fibkv.forecast import page_nbytes
from fibkv.inventory import Entry, Inventory
from fibkv.ladder import Ladder, Rung
from fibkv.page import Page
from fibkv.pressure import MEMORY_FACTORS, PressureConfig, PressureController
from fibkv.recode import recode
from fibkv.sealing import LayerSettings
from fibkv.sizes import format_size


@dataclass(slots=True)
class Promise:
    """Bytes set aside for one cache."""

    nbytes: int = 0


class Governor:
    """Holds the caches of an inventory to a budget. Safe to use from several threads.

    Args:
        inventory: what there is.
        budget: in bytes.
        ladder: codecs by level.
        config: of the controller.
        pages_per_step: pages that one step may re-encode to bring pressure down.
    """

    def __init__(
        self, inventory: Inventory, budget: int, ladder: Ladder, config: PressureConfig, pages_per_step: int
    ) -> None:
        self.budget = budget
        self.controller = PressureController(config)
        self.pages_per_step = pages_per_step
        self.rungs = ladder.rungs(config)
        self.recoded_pages = 0
        self.recoding_seconds = 0.0
        self.longest_step_seconds = 0.0
        self.refusals = 0
        self.damaged_pages = 0
        self._inventory = inventory
        self._claimed = 0
        self._claims = threading.Lock()
        # Claims whose caches are gone: noted by the garbage collector, which may interrupt any of these functions.
        self.abandoned: deque[Promise] = deque()
        # One thread re-encodes at a time. Never waited for with the lock of a layer's cache held.
        self._work = threading.Lock()

    @property
    def level(self) -> Rung:
        """The rung at which new pages are sealed."""
        return self.controller.level

    def rungs_from_level(self) -> tuple[Rung, ...]:
        """The rungs from the level on that new pages may be sealed at."""
        return self.rungs[self.rungs.index(self.level) :]

    @property
    def claimed(self) -> int:
        """Bytes of steps under way, which are not all allocated yet."""
        return self._claimed

    @property
    def occupancy(self) -> float:
        """Bytes that exist, and those that steps under way will make exist, over the budget."""
        return (self._inventory.allocated + self._claimed) / self.budget

    def step(self) -> Rung:
        """Once per step: one sample of the pressure, and a bounded amount of work against it. Returns the level."""
        occupancy = self.occupancy
        level = self.controller.observe(occupancy)
        threshold = self._threshold(level)
        # If another thread is at it, this one need not wait.
        if occupancy >= threshold and self._work.acquire(blocking=False):
            started = perf_counter()
            try:
                self._relieve(level, threshold)
            finally:
                self._work.release()
                self.longest_step_seconds = max(self.longest_step_seconds, perf_counter() - started)
        return level

    def step_down(self, pages: Sequence[Page]) -> bool:
        """Brings pages to the last rung, whatever the pressure; False if another thread is at work just now."""
        if not self._work.acquire(blocking=False):
            return False
        try:
            for page in pages:
                entry = self._inventory.entry(page)
                if entry is not None and entry.rung in self._above(self.rungs[-1]):
                    self._recode(entry, self.rungs[-1])
        finally:
            self._work.release()
        return True

    def claim(self, nbytes: int) -> None:
        """Sets bytes aside, making room for them if need be.

        Raises:
            BudgetError: they do not fit. Nothing was set aside then, and nothing was re-encoded in vain if that could
                be known beforehand.
        """
        if self._try_claim(nbytes):
            return
        with self._work:
            if not self.may_fit(nbytes):
                self._refuse(nbytes)
            while not self._try_claim(nbytes):
                if not self._recode_one():
                    self._refuse(nbytes)

    def unclaim(self, nbytes: int) -> None:
        """Gives up bytes that were set aside: they are allocated now, or not needed."""
        with self._claims:
            self._claimed -= nbytes

    def _try_claim(self, nbytes: int) -> bool:
        while self.abandoned:
            self.unclaim(self.abandoned.popleft().nbytes)
        allocated = self._inventory.allocated
        with self._claims:
            fits = allocated + self._claimed + nbytes <= self.budget
            if fits:
                self._claimed += nbytes
        return fits

    def may_fit(self, nbytes: int) -> bool:
        """Whether so many bytes would fit if every page were at the last rung."""
        lacking = self._inventory.allocated + self._claimed + nbytes - self.budget
        return lacking <= 0 or lacking <= self._reclaimable()

    def _threshold(self, level: Rung) -> float:
        """The occupancy above which pages are brought to a level."""
        config = self.controller.config
        match level:
            case "fp16":
                return float("inf")
            case "q4":
                return config.q4_threshold
            case _:
                return config.q8_threshold

    def _relieve(self, level: Rung, threshold: float) -> None:
        """Re-encodes at most `pages_per_step` pages, until the occupancy is under the threshold."""
        targets: list[Rung] = [level, "q2"] if level == "q4" and "q2" in self.rungs else [level]
        left = self.pages_per_step
        for target in targets:
            while left and self.occupancy >= threshold and self._recode_oldest(target):
                left -= 1

    def _recode_one(self) -> bool:
        """Re-encodes one page, to the first rung from the level on that any page is above of."""
        return any(self._recode_oldest(rung) for rung in self.rungs_from_level())

    def _reclaimable(self) -> int:
        """Bytes that would be free if every page were at the last rung."""
        return sum(
            max(0, entry.nbytes - _nbytes_at(entry, self.rungs[-1]))
            for entry in self._inventory.entries()
            if entry.rung in self._above(self.rungs[-1])
        )

    def _above(self, target: Rung) -> tuple[Rung, ...]:
        """Rungs whose pages take more memory than the target's."""
        return tuple(rung for rung in self.rungs if _factor(rung) > _factor(target))

    def _recode_oldest(self, target: Rung) -> bool:
        """Re-encodes the oldest page above a rung; False if there is none."""
        entry = self._inventory.pop_oldest(self._above(target))
        if entry is not None:
            self._recode(entry, target)
        return entry is not None

    def _recode(self, entry: Entry, target: Rung) -> None:
        """Re-encodes a page, unless it is gone in the meantime, damaged, or no smaller for it."""
        started = perf_counter()
        page = entry.page()
        settings = _settings_at(entry, target)
        if page is None or settings is None:
            return
        try:
            new = recode(page, settings, self._inventory.slabs)
        except DigestMismatch:
            self.damaged_pages += 1  # left as it is, for `Cache.verify` to find
            return
        except EncodingError:
            return  # what cannot be encoded stays as it is
        if new.nbytes < page.nbytes:
            self._inventory.recoded(entry, new, target)
            self.recoded_pages += 1
        self.recoding_seconds += perf_counter() - started

    def _refuse(self, nbytes: int) -> None:
        self.refusals += 1
        raise BudgetError(
            f"memory budget: expected room for {format_size(nbytes)} in {format_size(self.budget)}, got "
            f"{format_size(self._inventory.allocated)} held and {format_size(self._claimed)} promised to steps under "
            f"way, with old pages at {self.rungs[-1]}; retry when sequences have finished, or use a larger budget"
        )


def _factor(rung: Rung) -> float:
    return 0.125 if rung == "q2" else MEMORY_FACTORS[rung]


def _settings_at(entry: Entry, rung: Rung) -> LayerSettings | None:
    holders = (known() for known in entry.holders)
    return next((holder.rungs[rung] for holder in holders if holder is not None and rung in holder.rungs), None)


def _nbytes_at(entry: Entry, rung: Rung) -> int:
    page, settings = entry.page(), _settings_at(entry, rung)
    if page is None or settings is None:
        return entry.nbytes
    return page_nbytes(settings, page.start, page.tokens, page.device)
