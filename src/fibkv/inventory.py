"""What the caches of one pool hold: every byte, and every page by age and by content.

Pages are shared by reference, so their reference counts are Python's own: a page is gone when the last cache, fork or
snapshot that could read it is gone, and what it held is counted until then. The garbage collector may find that out
anywhere, in the middle of these functions too: it only makes a note, and the next call sees to it.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fibkv.ladder import Rung
from fibkv.packed import Held, Packed
from fibkv.page import Page
from fibkv.sealing import LayerSettings
from fibkv.slabs import Slabs
from fibkv.space import KeySpace
from fibkv.tables import Tables


class Holder(Protocol):
    """The cache of one layer, as an inventory knows it."""

    rungs: dict[Rung, LayerSettings]
    """How its pages are sealed at each rung; empty = they stay as they are."""

    def replace(self, old: Page, new: Page) -> None:
        """Puts a page in the place of another one with the same tokens, if it still has that one."""


@dataclass(eq=False, slots=True)
class Entry:
    """One page.

    Attributes:
        serial: pages that were sealed earlier have lower ones.
        path: rungs that its vectors went through, the last one being its own; empty = it is on no ladder.
        nbytes: of the page.
        outside: those of its bytes that do not lie in slabs.
        digest: of the page.
        page: gone when nothing can read it any more.
        holders: the layer caches that have had it in their page tables, those that are gone included.
    """

    serial: int
    path: tuple[Rung, ...]
    nbytes: int
    outside: int
    digest: str
    page: weakref.ref[Page]
    holders: list[weakref.ref[Holder]] = field(default_factory=list)

    def add(self, holder: Holder) -> None:
        """Notes that a holder has it."""
        reference = weakref.ref(holder)  # one object per holder, however often it is asked for
        if not any(known is reference for known in self.holders):
            self.holders.append(reference)

    @property
    def rung(self) -> Rung | None:
        """The rung it is at; None = it is on no ladder."""
        return self.path[-1] if self.path else None


class Meter:
    """Bytes that exist, and the most that ever existed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slabs = 0
        self._other = 0
        self._peak = 0

    def set_slabs(self, nbytes: int) -> None:
        """Slabs hold so much now."""
        with self._lock:
            self._slabs = nbytes
            self._peak = max(self._peak, self._slabs + self._other)

    def add(self, nbytes: int) -> None:
        """So much more (or less) is held outside of slabs."""
        with self._lock:
            self._other += nbytes
            self._peak = max(self._peak, self._slabs + self._other)

    @property
    def total(self) -> int:
        """Bytes that exist."""
        with self._lock:
            return self._slabs + self._other

    @property
    def other(self) -> int:
        """Those of them that are not in slabs."""
        return self._other

    @property
    def peak(self) -> int:
        """The most that ever existed at once."""
        return self._peak


class Account:
    """Bytes of one holder beside its pages: tails and page tables, windows and states. Closed when it is gone."""

    def __init__(self, meter: Meter, is_layer: bool) -> None:
        self.is_layer = is_layer
        self._meter = meter
        self._nbytes = 0

    def set(self, nbytes: int) -> None:
        """The holder has so much now."""
        if nbytes != self._nbytes:
            self._meter.add(nbytes - self._nbytes)
            self._nbytes = nbytes


class Inventory:
    """Memory, pages and accounts of the caches of one pool. Safe to use from several threads.

    Args:
        tracked: whether pages are listed: for a pool. A cache on its own needs slabs and nothing else.
    """

    def __init__(self, *, tracked: bool = False) -> None:
        self.tracked = tracked
        self.meter = Meter()
        self.slabs = Slabs(self.meter.set_slabs)
        # Never taken with the lock of the slabs held, nor the other way round.
        self._lock = threading.Lock()
        self._entries: dict[int, Entry] = {}  # by id of the page
        self._by_digest: dict[str, Entry] = {}
        self._by_age: dict[Rung, list[tuple[int, int, Entry]]] = defaultdict(list)
        self._sealed = 0
        self._tables: dict[int, weakref.ref[Tensor]] = {}
        self.tables_nbytes = 0
        self._gone: deque[tuple[int, Entry]] = deque()
        self._closed: deque[Account] = deque()
        self._layers = 0
        self.shared = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Inventory:
        return self  # pages are shared between copies

    def __reduce__(self) -> tuple[type[Inventory], tuple[()]]:
        return Inventory, ()  # in another process pages are allocated anew

    def open(self, holder: object, *, is_layer: bool = True) -> Account:
        """An account for what a new holder has beside pages."""
        account = Account(self.meter, is_layer)
        self._layers += is_layer
        weakref.finalize(holder, self._closed.append, account).atexit = False
        return account

    def count_tables(self, tables: Iterable[Tables | KeySpace]) -> None:
        """Counts the tables of codecs, each once however many caches use it; they are kept for caches to come."""
        with self._lock:
            for tensor in (tensor for table in tables for tensor in table.tensors):
                known = self._tables.get(id(tensor))
                if known is None or known() is not tensor:
                    self._tables[id(tensor)] = weakref.ref(tensor)
                    self.tables_nbytes += tensor.nbytes
                    self.meter.add(tensor.nbytes)

    def adopt(self, holder: Holder, pages: Sequence[Page], rung: Rung | None, like: Page | None = None) -> list[Page]:
        """Lists pages of a holder.

        Args:
            holder: whose page table they go to.
            pages: in their place in memory.
            rung: that they are sealed at.
            like: a page that they are made of: they are as old, and have been where it has been.

        Returns:
            The pages, or those with the same content that are there already.
        """
        if not self.tracked:
            return list(pages)
        self.settle()
        with self._lock:
            return [self._adopt(holder, page, rung, like) for page in pages]

    def join(self, holder: Holder, pages: Sequence[Page]) -> None:
        """Notes that a holder has these pages too: a fork."""
        if self.tracked:
            with self._lock:
                for page in pages:
                    if (entry := self._entries.get(id(page))) is not None:
                        entry.add(holder)

    def recoded(self, old: Entry, page: Page, rung: Rung) -> None:
        """Lists what a page has become, and hands it to all who hold the old one."""
        with self._lock:
            holders = [holder for known in old.holders if (holder := known()) is not None]
            entry = self._enter(page, old.serial, (*old.path, rung))
            for holder in holders:
                entry.add(holder)
            before = old.page()
        # Without the lock: holders take theirs, and call back here while they have it.
        if before is not None:
            for holder in holders:
                holder.replace(before, page)

    def pop_oldest(self, rungs: Sequence[Rung]) -> Entry | None:
        """Takes the oldest page at one of the rungs from the list of those that can be re-encoded."""
        self.settle()
        with self._lock:
            for rung in rungs:
                heap = self._by_age[rung]
                while heap and heap[0][2].page() is None:
                    heapq.heappop(heap)
            filled = [rung for rung in rungs if self._by_age[rung]]
            if not filled:
                return None
            first = min(filled, key=lambda rung: self._by_age[rung][0][0])
            return heapq.heappop(self._by_age[first])[2]

    def push(self, entry: Entry) -> None:
        """Puts a page back on that list."""
        with self._lock:
            self._list(entry)

    def entries(self) -> list[Entry]:
        """All pages, as of one moment."""
        self.settle()
        with self._lock:
            return list(self._entries.values())

    def entry(self, page: Page) -> Entry | None:
        """What is known of a page."""
        return self._entries.get(id(page))

    @property
    def allocated(self) -> int:
        """Bytes that exist: slabs with their slack, pages outside of them, metadata, tails, page tables, tables."""
        self.settle()
        # Reading what slabs hold makes them see to returned blocks.
        _ = self.slabs.allocated_nbytes
        return self.meter.total

    @property
    def layers(self) -> int:
        """Caches of layers that there are."""
        self.settle()
        return self._layers

    def settle(self) -> None:
        """Sees to pages and holders that are gone."""
        while self._closed:
            account = self._closed.popleft()
            account.set(0)
            self._layers -= account.is_layer
        if not self._gone:
            return
        with self._lock:
            while self._gone:
                key, entry = self._gone.popleft()
                self.meter.add(-entry.outside)
                # The key may be another page's by now.
                if self._entries.get(key) is entry:
                    del self._entries[key]
                if self._by_digest.get(entry.digest) is entry:
                    del self._by_digest[entry.digest]

    def _adopt(self, holder: Holder, page: Page, rung: Rung | None, like: Page | None) -> Page:
        parent = None if like is None else self._entries.get(id(like))
        path = parent.path if parent is not None else () if rung is None else (rung,)
        known = self._by_digest.get(page.digest)
        same = None if known is None or known.path != path else known.page()
        if known is not None and same is not None and _held_alike(same, page):
            known.add(holder)
            self.shared += same is not page
            return same
        if parent is None:
            self._sealed += 1
        self._enter(page, self._sealed if parent is None else parent.serial, path).add(holder)
        return page

    def _enter(self, page: Page, serial: int, path: tuple[Rung, ...]) -> Entry:
        outside = page.nbytes - sum(codes.nbytes for codes in page.held if isinstance(codes, Packed))
        entry = Entry(serial, path, page.nbytes, outside, page.digest, weakref.ref(page))
        weakref.finalize(page, self._gone.append, (id(page), entry)).atexit = False
        self._entries[id(page)] = self._by_digest[page.digest] = entry
        self.meter.add(outside)
        self._list(entry)
        return entry

    def _list(self, entry: Entry) -> None:
        if entry.rung is not None:
            heapq.heappush(self._by_age[entry.rung], (entry.serial, id(entry), entry))

    def by_rung(self) -> Iterator[tuple[Rung | None, int, int]]:
        """(rung, pages, bytes), from the least to the most compact; pages on no ladder come first, as None."""
        sums: dict[Rung | None, list[int]] = defaultdict(lambda: [0, 0])
        for entry in self.entries():
            sums[entry.rung][0] += 1
            sums[entry.rung][1] += entry.nbytes
        yield from ((rung, pages, nbytes) for rung, (pages, nbytes) in sums.items())


def _held_alike(one: Page, other: Page) -> bool:
    """Whether kernels can read one in the place of the other: not so across devices or implementations."""
    return all(_place(a) == _place(b) for a, b in zip(one.held, other.held, strict=True))


def _place(held: Held) -> tuple[object, ...]:
    return (type(held), held.device, held.side if isinstance(held, Packed) else None)
