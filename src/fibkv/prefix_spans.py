"""Reading the spans of a prefix, ahead of need where a store answers late, and checking some of them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from fibkv import kernels
from fibkv.errors import FibkvError, StoreError
from fibkv.kernels.native import Native
from fibkv.manifest import Place, spans_from_bytes
from fibkv.page import Page
from fibkv.populate import Populating
from fibkv.prefix_places import span_key
from fibkv.sealing import LayerSettings
from fibkv.slabs import Lanes, Slabs
from fibkv.store.base import Store
from fibkv.wire import Packing, PageReader

Span = tuple[tuple[Page, ...], int]
"""The pages of a span, one per layer, and the bytes that were read."""

# Groups of spans that are on their way at the same time, from stores that answer late.
AHEAD = 4
# Small spans are checked together, as many as fit the processor's caches: what it takes to begin comes once then.
GROUP_NBYTES, MAX_GROUP = 1 << 21, 16


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """What came of reading some spans.

    Attributes:
        places: of those that were asked for.
        found: the bytes of the first ones of them.
        end: why there are not more: None = the next one is not there. Empty = all came.
    """

    places: Sequence[Place]
    found: list[bytes]
    end: list[StoreError | None]


class SpanReader:
    """Reads spans that follow one another.

    Args:
        store: where from.
        settings: of the layers.
        places: of the spans.
        slabs: memory that they are put into as they come, in the order in which native kernels read them; None =
            codes stay where they were read.
    """

    def __init__(
        self, store: Store, settings: Sequence[LayerSettings], places: Sequence[Place], slabs: Slabs | None
    ) -> None:
        self._store = store
        self._places = places
        self._readers = [PageReader(layer) for layer in settings]
        self._populating = Populating()
        self._pack = None
        if slabs is not None:
            self._pack = packing(settings, Lanes(slabs, len(settings), len(places), self._populating.begin))

    def read(self) -> Generator[Span | FibkvError | None]:
        """The spans in order, up to the first that is not there (None), or that was refused or not read (why)."""
        try:
            yield from self._read()
        finally:
            self._populating.end()

    def _read(self) -> Generator[Span | FibkvError | None]:
        outcomes = self._checked(self._fetch(0, 1))
        yield from outcomes
        if not outcomes or not isinstance(outcomes[0], tuple):
            return
        size = min(MAX_GROUP, max(1, GROUP_NBYTES // outcomes[0][1]))
        groups = [(start, start + size) for start in range(1, len(self._places), size)]
        with closing(self._coming(groups)) as coming:
            for fetched in coming:
                outcomes = self._checked(fetched)
                yield from outcomes
                if not isinstance(outcomes[-1], tuple):
                    return

    def _coming(self, groups: Sequence[tuple[int, int]]) -> Generator[Fetched]:
        """Groups of spans in order: in turn, or some ahead if reading takes longer than what is done between."""
        reading = checking = 0.0
        for index, group in enumerate(groups):
            began = perf_counter()
            fetched = self._fetch(*group)
            came = perf_counter()
            yield fetched
            reading, checking = reading + came - began, checking + perf_counter() - came
            if reading > checking:
                yield from self._ahead(groups[index + 1 :])
                return

    def _ahead(self, groups: Sequence[tuple[int, int]]) -> Generator[Fetched]:
        """Groups of spans in order, some of which are read at the same time."""
        left = deque(groups)
        with ThreadPoolExecutor(AHEAD, "fibkv-load") as loading:
            coming = deque(loading.submit(self._fetch, *left.popleft()) for _ in range(min(AHEAD, len(left))))
            while coming:
                fetched = coming.popleft().result()
                if left:
                    coming.append(loading.submit(self._fetch, *left.popleft()))
                yield fetched

    def _fetch(self, start: int, stop: int) -> Fetched:
        """The bytes of some spans."""
        places, found = self._places[start:stop], list[bytes]()
        for name, *_ in places:
            try:
                data = self._store.get(span_key(name))
            except StoreError as error:
                return Fetched(places, found, [error])
            if data is None:
                return Fetched(places, found, [None])
            found.append(data)
        return Fetched(places, found, [])

    def _checked(self, fetched: Fetched) -> list[Span | FibkvError | None]:
        """Some spans, and why there are not more of them, if so."""
        # Memory for pages outlives the caller's mode.
        with torch.inference_mode(False):
            return [*self._spans(fetched.found, fetched.places[: len(fetched.found)]), *fetched.end]

    def _spans(self, found: Sequence[bytes], places: Sequence[Place]) -> list[Span | FibkvError]:
        if not found:
            return []
        try:
            pages = spans_from_bytes(found, places, self._readers, self._pack)
        except FibkvError as error:
            if len(found) == 1:
                return [error]
            # Which of them it is: those before it are sound.
            each = (self._spans([data], [place])[0] for data, place in zip(found, places, strict=True))
            return list(_until_refused(each))
        return list(zip(pages, map(len, found), strict=True))


def _until_refused(spans: Iterator[Span | FibkvError]) -> Iterator[Span | FibkvError]:
    for span in spans:
        yield span
        if isinstance(span, FibkvError):
            return


def packing(settings: Sequence[LayerSettings], memory: Lanes) -> Packing | None:
    """Puts codes in the order of the layers' kernels, if these are native."""
    found = kernels.resolve(settings[0].keys.implementation, torch.device("cpu"))
    return partial(found.pack_bytes, memory=memory) if isinstance(found, Native) else None
