"""Ranges of bytes in regions of memory: which are taken, which are free, which parts must exist at all.

Bookkeeping without memory: `fibkv.slabs` puts memory behind it, `fibkv.forecast` counts with it alone.

A region is a stretch of address space. It exists in *grains*, the operating system's pages: a grain that no taken range
touches is given back, so what a region costs is the grains under its taken ranges, whatever the order in which they
were taken and returned. Free neighbours are joined, and a range of any size may be cut from them: there are no size
classes that could starve one another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

SMALL_GRAIN = 4096
HUGE_GRAIN = 2 << 20
# Small requests share regions of this size, or of a part of what is in use, whichever is more.
SHARED_REGION = HUGE_GRAIN
SHARED_PART = 32


@dataclass(frozen=True, slots=True)
class Taken:
    """A range that was taken.

    Attributes:
        region: number of the region, never used twice.
        start: first byte in the region.
        nbytes: length.
    """

    region: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Released:
    """Memory that no taken range touches any more: whole grains, or with ``nbytes`` 0 the whole region."""

    region: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RegionForm:
    """What memory a region wants.

    Attributes:
        size: bytes of address space.
        grain: unit in which it exists.
        huge: whether huge pages do not make more of it exist than is used. Where a shared region is filled bit by bit
            in small grains, a huge page would exist long before it is full.
    """

    size: int
    grain: int
    huge: bool


class _Region:
    """One region: its free ranges, by either end."""

    def __init__(self, form: RegionForm) -> None:
        size = form.size
        self.form = form
        self.grain = form.grain
        self.by_start = {0: size}
        self.by_stop = {size: 0}

    def inside(self, start: int, stop: int) -> tuple[int, int]:
        """The grains that lie wholly in ``start:stop``; empty ones have equal ends."""
        first, last = -(-start // self.grain) * self.grain, stop // self.grain * self.grain
        return first, max(first, last)

    def absent(self, start: int, stop: int) -> int:
        """Bytes of a free range that do not exist."""
        first, last = self.inside(start, stop)
        return last - first


class Ranges:
    """Takes and returns ranges, the best-fitting free one first, and counts what exists.

    Not safe for several threads: whoever owns it has the lock.
    """

    def __init__(self) -> None:
        self._regions: dict[int, _Region] = {}
        self._made = 0
        # (length, region, start) of every free range: the first that is long enough fits best.
        self._free: list[tuple[int, int, int]] = []
        self._used = 0
        self._allocated = 0

    @property
    def used(self) -> int:
        """Bytes of taken ranges."""
        return self._used

    @property
    def allocated(self) -> int:
        """Bytes that exist: all grains that taken ranges touch."""
        return self._allocated

    @property
    def regions(self) -> int:
        """Regions that there are."""
        return len(self._regions)

    def form_of(self, region: int) -> RegionForm:
        """What memory a region wants."""
        return self._regions[region].form

    def take(self, nbytes: int) -> Taken:
        """Takes ``nbytes`` (more than 0), from a new region if no free range is long enough."""
        at = bisect_left(self._free, (nbytes, 0, 0))
        if at == len(self._free):
            self._add_region(nbytes)
            at = bisect_left(self._free, (nbytes, 0, 0))
        length, number, start = self._free[at]
        region = self._regions[number]
        before = region.absent(start, start + length)
        self._remove(number, start, start + length)
        self._insert(number, start + nbytes, start + length)
        self._allocated += before - region.absent(start + nbytes, start + length)
        self._used += nbytes
        return Taken(number, start, nbytes)

    def give(self, taken: Taken) -> Released | None:
        """Returns a range, or a part of one that was taken; None if no grain is free of ranges because of it."""
        number, start, stop = taken.region, taken.start, taken.start + taken.nbytes
        region = self._regions[number]
        absent = 0
        if (before := region.by_stop.get(start)) is not None:
            absent += region.absent(before, start)
            self._remove(number, before, start)
            start = before
        if (after := region.by_start.get(stop)) is not None:
            absent += region.absent(stop, after)
            self._remove(number, stop, after)
            stop = after
        self._used -= taken.nbytes
        self._allocated -= region.absent(start, stop) - absent
        if (start, stop) == (0, region.form.size):
            del self._regions[number]
            return Released(number, 0, 0)
        self._insert(number, start, stop)
        return _released(region, taken, start, stop)

    def _add_region(self, nbytes: int) -> None:
        number, self._made = self._made, self._made + 1
        self._regions[number] = _Region(_form(nbytes, self._used))
        insort(self._free, (self._regions[number].form.size, number, 0))

    def _insert(self, number: int, start: int, stop: int) -> None:
        if start < stop:
            region = self._regions[number]
            region.by_start[start], region.by_stop[stop] = stop, start
            insort(self._free, (stop - start, number, start))

    def _remove(self, number: int, start: int, stop: int) -> None:
        region = self._regions[number]
        del region.by_start[start], region.by_stop[stop]
        del self._free[bisect_left(self._free, (stop - start, number, start))]


def _form(nbytes: int, used: int) -> RegionForm:
    """Of a region for ``nbytes``: of its own if they are many, else one that later requests will share."""
    if nbytes >= HUGE_GRAIN:
        return RegionForm(-(-nbytes // SMALL_GRAIN) * SMALL_GRAIN, SMALL_GRAIN, huge=True)
    size = max(SHARED_REGION, used // SHARED_PART)
    # Slack of one huge grain is little in a region of many.
    huge = size >= SHARED_PART * HUGE_GRAIN
    grain = HUGE_GRAIN if huge else SMALL_GRAIN
    return RegionForm(-(-size // grain) * grain, grain, huge)


def _released(region: _Region, taken: Taken, start: int, stop: int) -> Released | None:
    """The grains of a free range ``start:stop`` that the range just returned was the last one to touch."""
    grain = region.grain
    first = max(region.inside(start, stop)[0], taken.start // grain * grain)
    last = min(region.inside(start, stop)[1], -(-(taken.start + taken.nbytes) // grain) * grain)
    return Released(taken.region, first, last - first) if first < last else None
