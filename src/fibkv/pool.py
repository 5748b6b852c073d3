"""One memory budget for the caches of many sequences.

pool = fibkv.Pool(budget="2GiB")
cache = fibkv.Cache(model, pool=pool)     # one per sequence or batch, on any thread
"""

from __future__ import annotations

import re
import weakref
from typing import Any

from fibkv.errors import ContractError
from fibkv.governor import Governor, Promise
from fibkv.inventory import Inventory
from fibkv.ladder import RUNGS, Ladder
from fibkv.machine import available_memory
from fibkv.pool_stats import PoolStats, RungStats
from fibkv.pressure import PressureConfig
from fibkv.sizes import parse_size

_SHARE = re.compile(r"([0-9]{1,3})\s*%")


class Pool:
    """Memory of many caches, held to a budget by a governor. Safe to use from several threads.

    Caches of a pool share memory and pages: pages of equal content are kept once, whichever sequence sealed them. As
    the budget fills, the governor seals new pages at a lower precision and re-encodes old ones, oldest first; protected
    regions and raw tails are left alone. A step that does not fit even then is refused with a `BudgetError` before
    anything of it is done. The caches never hold more than the budget by more than the pages that are being re-encoded,
    one at a time.

    Args:
        budget: bytes, as a number, a size such as "2GiB", or a share of the memory that is free now, "80%", within the
            limits of the control group. None = no budget: nothing is governed, everything is counted.
        pressure: thresholds and bounds of the controller.
        ladder: codecs by level. Caches with a codec of their own (``bits``, ``profile``) are counted, not re-encoded.
        pages_per_step: pages that one step of one cache may re-encode to bring pressure down; more only where the
            step would not fit otherwise.
        step_down_after: pages that end so many tokens before the newest token of their sequence go to the last rung of
            the ladder, whatever the pressure, `pages_per_step` columns of one layer's page table at a time. None = age
            alone costs no precision.

    Raises:
        ContractError: not a size; a ladder without a rung that the controller may choose.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        pressure: PressureConfig | None = None,
        ladder: Ladder | None = None,
        pages_per_step: int = 4,
        step_down_after: int | None = None,
    ) -> None:
        if pages_per_step < 1:
            raise ContractError("Pool.pages_per_step", "at least 1", pages_per_step)
        if step_down_after is not None and (step_down_after < 1 or budget is None):
            raise ContractError("Pool.step_down_after", "at least 1 token, in a pool with a budget", step_down_after)
        self.step_down_after = step_down_after
        self._arguments: dict[str, Any] = {
            "budget": budget,
            "pressure": pressure,
            "ladder": ladder,
            "pages_per_step": pages_per_step,
            "step_down_after": step_down_after,
        }
        self.ladder = ladder or Ladder()
        self.inventory = Inventory(tracked=True)
        config = pressure or PressureConfig()
        self.governor = (
            None
            if budget is None
            else Governor(self.inventory, budget_nbytes(budget), self.ladder, config, pages_per_step)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Pool:
        return self  # copies of a cache stay in its pool

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self._arguments,)  # in another process there is another pool, with the same settings

    def stats(self) -> PoolStats:
        """What the pool holds and has done, as of now."""
        held, governor = self.inventory, self.governor
        by_rung = sorted(held.by_rung(), key=lambda row: -1 if row[0] is None else RUNGS.index(row[0]))
        allocated = held.allocated
        state = None if governor is None else governor.controller.snapshot()
        return PoolStats(
            budget=None if governor is None else governor.budget,
            allocated=allocated,
            slack=held.slabs.slack_nbytes,
            peak=held.meter.peak,
            claimed=0 if governor is None else governor.claimed,
            tables=held.tables_nbytes,
            rungs=tuple(RungStats(rung=rung, pages=pages, nbytes=nbytes) for rung, pages, nbytes in by_rung),
            shared_pages=held.shared,
            layers=held.layers,
            pressure=state,
            recoded_pages=0 if governor is None else governor.recoded_pages,
            recoding_seconds=0.0 if governor is None else governor.recoding_seconds,
            longest_step_seconds=0.0 if governor is None else governor.longest_step_seconds,
            refusals=0 if governor is None else governor.refusals,
            damaged_pages=0 if governor is None else governor.damaged_pages,
        )


class Claim:
    """Bytes that the steps of one cache have set aside: given up when the claim is gone."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._promise = Promise()
        weakref.finalize(self, governor.abandoned.append, self._promise).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes set aside."""
        return self._promise.nbytes

    def may_fit(self, nbytes: int) -> bool:
        """Whether so many bytes, those already set aside among them, would fit if every page were at the last rung."""
        return self._governor.may_fit(nbytes - self._promise.nbytes)

    def set(self, nbytes: int) -> None:
        """Sets so many bytes aside from now on.

        Raises:
            BudgetError: they do not fit. What was set aside before still is.
        """
        more = nbytes - self._promise.nbytes
        if more > 0:
            self._governor.claim(more)
        elif more < 0:
            self._governor.unclaim(-more)
        self._promise.nbytes = nbytes


def budget_nbytes(budget: int | str) -> int:
    """The bytes of a budget: a size, or a share of the memory that is free now.

    Raises:
        ContractError: neither of them.
    """
    share = _SHARE.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if share is None:
        return parse_size(budget, field="Pool.budget")
    if not 0 < int(share[1]) <= 100:
        raise ContractError("Pool.budget", "a share of 1% to 100%", budget)
    return available_memory() * int(share[1]) // 100


def _made(arguments: dict[str, Any]) -> Pool:
    return Pool(**arguments)
