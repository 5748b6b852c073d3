"""The live cache of one layer: per batch row a table of sealed pages, and one raw tail of the newest tokens.

append: tail -> page full -> policy -> `RoleCoder.seal` -> page table. read: an immutable `View`.
Positions are cache slots: all rows have one length, as transformers' masks demand; padding is the mask's business.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fibkv.ahead import Pending
from fibkv.deferred import DeferredPages
from fibkv.errors import PageError
from fibkv.hard_statistics import key_flags, key_statistics
from fibkv.inventory import Inventory
from fibkv.ladder import Rung
from fibkv.page import METADATA_NBYTES, Page
from fibkv.page_memory import PageMemory
from fibkv.quarantine import Quarantine
from fibkv.sealing import LayerSettings, Span, full_spans, in_blocks, seal
from fibkv.space import KeySpace
from fibkv.tables import Tables
from fibkv.view import PageRows, Tail, View, plain_tensors


class LayerCache:
    """Keys and values of one layer for all batch rows.

    For use by one thread at a time; meanwhile others may `replace` its pages. Copies (`copy.deepcopy`) share sealed
    pages.
    """

    def __init__(
        self,
        settings: LayerSettings,
        keys: Tensor,
        values: Tensor,
        quarantine: Quarantine,
        inventory: Inventory | None = None,
        rungs: Mapping[Rung, LayerSettings] | None = None,
        memory: PageMemory | None = None,
    ) -> None:
        """An empty cache for tensors like ``keys [B, H, t, d]`` and ``values [B, H, t, d_value]``.

        Layers of one model, and all caches of a pool, share their ``inventory``: memory, pages, accounts. In a pool
        with a ladder, ``rungs`` are the settings at each of its rungs, of which ``settings`` is one. ``memory`` is
        where pages lie, and whether they are sealed beside the model; by default the layer waits for them.
        """
        self.settings = settings
        self.quarantine = quarantine
        self.rungs = dict(rungs or {})
        self.flags: tuple[str, ...] | None = None
        """What is hard about the keys of the first page; None = no page was sealed yet."""
        # Around every change of the page tables that is made from what they were: others may replace pages.
        self._lock = threading.Lock()
        self._inventory = inventory or Inventory()
        self._account = self._inventory.open(self)
        self._home = memory or PageMemory(self._inventory.slabs, keys.device)
        self._memory = self._home
        self._pending: Pending | DeferredPages | None = None
        self._rows = PageRows([()] * keys.shape[0])
        self._capacity = settings.tokens_per_page + settings.last_tokens_raw
        with plain_tensors(keys):
            self._tail = self._tail_of(Tail(keys.detach(), values.detach(), 0), 0, 0)
        self._length = 0
        self._inventory.count_tables(self.tables())
        self._count()

    @property
    def length(self) -> int:
        """Tokens held, the same for every row."""
        return self._length

    @property
    def implementation(self) -> str:
        """Of the kernels."""
        return self.settings.keys.implementation

    @property
    def batch(self) -> int:
        """Batch rows."""
        return len(self._rows)

    @property
    def rows(self) -> PageRows:
        """The page tables."""
        self.settle()
        return self._rows

    @property
    def tail(self) -> Tail:
        """The newest tokens."""
        self.settle()
        return self._tail

    def append(self, keys: Tensor, values: Tensor, *, hold_back: int = 0) -> View:
        """Adds tokens and returns what attention over all tokens has to read.

        Full pages are sealed behind the returned snapshot: this call still reads the new tokens exactly, later ones
        read their codes. With ``read_through`` sealing comes first. Beside the model it is begun here, and waited for
        when something asks for the pages, at the latest by the next append; by a worker, while it is at it and no
        more pages are due, appends go on and their tokens are read exactly.

        Args:
            keys: ``[B, H, t, d]``.
            values: ``[B, H, t, d_value]``.
            hold_back: newest tokens that a crop may take back: what is due because of them alone is sealed by the
                next append or crop. Not with ``read_through``.

        Raises:
            PageError: another batch size, heads or widths than the cache's, or a page in quarantine.
            EncodingError: a page can be neither encoded nor kept raw. The cache is as it was before the call.
        """
        self._tail.check(self.settings.layer, keys, values)
        self._refuse_quarantined()
        length = self._length + keys.shape[2]
        if self._has_room(keys.shape[2]):
            self._tail, self._length = self._tail.extended(keys, values), length
            return self._view(self._tail, length)
        with plain_tensors(keys):
            if self._can_go_on(keys.shape[2]):
                self._tail, self._length = self._tail.extended(keys.detach(), values.detach()), length
                self._count()
                return self._view(self._tail, length)
            self._seal_due()
            recent = self._tail.extended(keys.detach(), values.detach())
            before = self._view(recent, length)
            held = 0 if self.settings.read_through else hold_back
            # A pool counts what there is, and must know.
            wait = self.settings.read_through or self._inventory.tracked
            self._seal(recent, length, full_spans(self.settings, recent.length - held, length), wait=wait)
        return self.view() if self.settings.read_through else before

    def view(self) -> View:
        """A snapshot of everything held."""
        self._refuse_quarantined()
        self.settle()
        return self._view(self._tail, self._length)

    def _view(self, tail: Tail, length: int) -> View:
        rows, lease = self._memory.reading(self._rows)
        return View(rows, tail, length, self.implementation, lease)

    def adopt(self, pages: Sequence[Page], keys: Tensor, values: Tensor) -> None:
        """Takes over what another cache of these settings held, in place of what is held: one row.

        Args:
            pages: from token 0 on, without gaps, on any device.
            keys: raw, behind the pages, ``[1, H, t, d]``, on any device; copied.
            values: likewise ``[1, H, t, d_value]``.

        Raises:
            PageError: tensors of another form than the cache's, or pages with gaps. Nothing has changed then.
        """
        self._tail.check(self.settings.layer, keys, values)
        stops = [0, *(page.start + page.tokens for page in pages)]
        if self.batch != 1 or stops[:-1] != [page.start for page in pages]:
            raise PageError(f"layer {self.settings.layer}: expected one row, and pages from 0 on without gaps")
        with plain_tensors(keys):
            self._pending = None
            device = self._tail.keys.device
            self._rows = PageRows([()] * self.batch)
            self._append_pages([self._memory.place(pages, self.implementation)])
            self._tail = self._tail_of(Tail(keys.to(device), values.to(device), keys.shape[2]), 0, keys.shape[2])
            self._length = stops[-1] + keys.shape[2]
            self._count()

    def crop(self, length: int) -> None:
        """Keeps the first ``length`` tokens. A page that the cut goes through is shortened without loss.

        Tokens that `append` held back leave no trace: it is as if they had never been added.
        """
        with plain_tensors(self._tail.keys):
            is_encodable = self.settle()
            if length < self._length:
                tail_start = self._length - self._tail.length
                if length < tail_start:
                    self._map_pages(lambda page: self._resident(page.cut(length - page.start)))
                self._tail = self._tail_of(self._tail, 0, max(0, length - tail_start))
                self._length = length
            self._seal_due(beside=is_encodable)
            self._count()

    def select(self, indices: Sequence[int]) -> None:
        """Makes row ``i`` a copy of row ``indices[i]``: beams, repeats and selections. Pages are shared.

        Raises:
            PageError: a row that the cache does not have.
        """
        if not all(0 <= index < self.batch for index in indices):
            raise PageError(f"layer {self.settings.layer}: expected rows of 0..{self.batch - 1}, got {list(indices)}")
        self.settle()
        where = torch.as_tensor(indices, dtype=torch.long, device=self._tail.keys.device)
        with self._lock:
            self._rows = self._memory.tidied(PageRows(self._rows[index] for index in indices))
        with plain_tensors(where):
            self._tail = self._tail.map(lambda tensor: tensor.index_select(0, where))
        self._count()

    def to(self, device: torch.device, *, parked: bool = False) -> None:
        """Moves everything to a device; with ``parked``, only to come back: pages are not put in order to be read."""
        self.settle()
        if device == self._tail.keys.device:
            return
        self._memory = self._home if device == self._home.device else PageMemory(self._inventory.slabs, device)
        self._map_pages(lambda page: in_blocks([page], device)[0] if parked else self._resident(page))
        self._tail = self._tail.map(lambda tensor: tensor.to(device))
        self._count()

    def replace(self, old: Page, new: Page) -> None:
        """Puts a page in the place of another one with the same tokens, in every row that still has that one.

        For any thread. Snapshots that were taken before go on reading the old page.
        """
        with self._lock:
            if any(page is old for row in self._rows for page in row):
                self._rows = PageRows(tuple(new if page is old else page for page in row) for row in self._rows)

    def pages(self) -> Iterator[Page]:
        """Every distinct page once, however many rows share it."""
        yield from {id(page): page for row in self.rows for page in row}.values()

    def verify(self) -> None:
        """Checks every page against its digest; damaged ones go to quarantine and are refused from then on."""
        for page in self.pages():
            self.quarantine.admit("page", page.name, page.digest, page.compute_digest())

    @property
    def nbytes(self) -> int:
        """Bytes of pages (shared ones once), page tables' further entries, and the tail's buffers with their slack."""
        pages = list(self.pages())
        entries = sum(len(row) for row in self._rows) - len(pages)
        return sum(page.nbytes for page in pages) + 8 * entries + self._tail.nbytes

    def offloaded(self) -> tuple[int, int]:
        """Bytes of codes that were offloaded to host memory, and bytes that were allocated there for them."""
        return self._home.offloaded(self.pages())

    def raw_parts(self) -> tuple[int, int]:
        """Elements that are kept raw, row by row, and bytes behind them (shared pages once), the tail included."""
        tail = self.tail
        elements = tail.length * sum(t.shape[0] * t.shape[1] * t.shape[3] for t in (tail.keys, tail.values))
        for page in (page for row in self.rows for page in row):
            elements += sum(s.form.header.num_vectors * s.codec.head_dim for s in page.raw_segments())
        held = (segment.held.nbytes for page in self.pages() for segment in page.raw_segments())
        return elements, tail.nbytes + sum(held)

    def tables(self) -> Iterator[Tables | KeySpace]:
        """The tables behind the codes that pages have or may get; one may come twice."""
        for settings in (self.settings, *self.rungs.values()):
            yield from settings.tables()

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of the pages' digests and counts, and of the page tables."""
        distinct = sum(1 for _ in self.pages())
        return METADATA_NBYTES * distinct + 8 * (sum(len(row) for row in self._rows) - distinct)

    def raw_reasons(self) -> Counter[str]:
        """Vectors that pages hold raw, by reason."""
        counts: Counter[str] = Counter()
        for header in (one.header for page in self.pages() for one in page.form.segments):
            if header.raw_reason is not None:
                counts[header.raw_reason] += header.num_vectors
        return counts

    @contextmanager
    def corrupted(self, row: int, page: int) -> Iterator[None]:
        """For poison tests: damages one page in memory and restores it on exit, see `fibkv.page.Page.damaged`."""
        try:
            with self.rows[row][page].damaged():
                self._memory.changed()
                yield
        finally:
            self._memory.changed()

    def _refuse_quarantined(self) -> None:
        if not self.quarantine.is_empty:
            for page in self.pages():
                if self.quarantine.is_quarantined("page", page.name):
                    raise PageError(f"page {page.name} is in quarantine: its codes do not match its digest")

    def settle(self) -> bool:
        """Takes over the pages that are under way, waiting for them; False = they could not be encoded.

        What could not be encoded is due still: the next append or crop keeps it raw, or refuses.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        with plain_tensors(self._tail.keys):
            sealed = pending.pages()
            # The inventory counts them from now on, or nobody does.
            self._count()
            if sealed is None:
                return False
            if self.flags is None:
                self.flags = pending.flags()
            self._take_over(self._tail, self._length, sealed, pending.stop)
        return True

    def _has_room(self, tokens: int) -> bool:
        """Whether so many tokens only have to be written behind the tail's: most steps, of which each layer has one."""
        settings, stop = self.settings, self._tail.length + tokens
        is_due = settings.read_through or stop >= settings.tokens_per_page + settings.last_tokens_raw
        return self._pending is None and not is_due and stop <= self._tail.keys.shape[2]

    def _can_go_on(self, tokens: int) -> bool:
        """Whether pages under way may stay so while so many tokens come: a worker is at them, and no more are due."""
        if self._pending is None or not self._pending.may_wait:
            return False
        spans = full_spans(self.settings, self._tail.length + tokens, self._length + tokens)
        return spans[-1][1] == self._pending.stop

    def _seal_due(self, *, beside: bool = True) -> None:
        """Seals what was held back and has not been taken back."""
        is_encodable = self.settle() and beside
        if spans := full_spans(self.settings, self._tail.length, self._length):
            self._seal(self._tail, self._length, spans, wait=True, beside=is_encodable)

    def _seal(self, recent: Tail, length: int, spans: Sequence[Span], *, wait: bool, beside: bool = True) -> None:
        """Seals spans, then takes over: nothing of the cache changes before every page is encoded, or under way."""
        if spans and beside:
            pending = self._memory.begin(self, self.settings, recent, length, spans, self.flags is None)
            if pending is not None:
                before = self._tail, self._length
                self._pending, self._tail, self._length = pending, recent, length
                self._count()
                if not wait or self.settle():
                    return
                self._tail, self._length = before
        sealed = seal(self.settings, recent, length, spans)
        if any(sealed) and self.flags is None:
            protected = self.settings.keys.policy.protected.first_tokens_raw
            self.flags = key_flags(key_statistics(recent.keys[0, :, protected : spans[0][1]]))
        placed = [self._memory.place(pages, self.implementation) for pages in sealed]
        self._take_over(recent, length, placed, spans[-1][1] if spans else 0)

    def _take_over(self, recent: Tail, length: int, sealed: Sequence[Sequence[Page]], done: int) -> None:
        """Appends sealed pages, which are in their place, to the rows, and keeps what is behind them."""
        self._append_pages(sealed)
        has_room = done == 0 and recent.length < recent.keys.shape[2]
        kept = recent if has_room else self._tail_of(recent, done, recent.length)
        # Working copies exist beside each other for a moment, and count.
        self._count(*(one for one in (recent, kept) if one.keys is not self._tail.keys))
        self._tail, self._length = kept, length
        self._count()

    def _append_pages(self, placed: Sequence[Sequence[Page]]) -> None:
        """Appends to each row pages in their place, or those of the same content that the pool has already."""
        if any(placed):
            adopted = [self._inventory.adopt(self, pages, self.settings.rung) for pages in placed]
            with self._lock:
                self._rows = PageRows((*row, *pages) for row, pages in zip(self._rows, adopted, strict=True))

    def _count(self, *beside: Tail) -> None:
        """Tells the account what is held beside pages: tails, further entries of the page tables."""
        entries = sum(len(row) for row in self._rows[1:])
        under_way = 0 if self._pending is None else self._pending.nbytes
        self._account.set(8 * entries + under_way + sum(tail.nbytes for tail in (self._tail, *beside)))

    def _map_pages(self, function: Callable[[Page], Page | None]) -> None:
        """Replaces every distinct page once, so that rows go on sharing it; None removes it."""
        with self._lock:
            changed = {id(page): self._adopted(page, function(page)) for page in self.pages()}
            rows = (tuple(new for page in row if (new := changed[id(page)]) is not None) for row in self._rows)
            self._rows = self._memory.tidied(PageRows(rows))

    def _adopted(self, old: Page, new: Page | None) -> Page | None:
        if new is None or new is old:
            return new
        return self._inventory.adopt(self, [new], self.settings.rung, like=old)[0]

    def _resident(self, page: Page | None) -> Page | None:
        return None if page is None else self._memory.place([page], self.implementation)[0]

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_account")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._account = self._inventory.open(self)
        self._map_pages(self._resident)
        self._inventory.join(self, list(self.pages()))
        self._count()

    def _tail_of(self, tail: Tail, start: int, stop: int) -> Tail:
        """Tokens ``start:stop`` of a tail with room to fill a page; an empty tail takes no memory."""
        tokens = stop - start
        return tail.kept(start, stop, max(self._capacity, tokens + 1) if tokens else 0)
