"""Reading the spans of a prefix ahead of need, on a few threads, and checking them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore

import torch

from fibkv import kernels
from fibkv.errors import FibkvError, StoreError
from fibkv.kernels.native import Native
from fibkv.manifest import Place, spans_from_bytes
from fibkv.page import Page
from fibkv.prefix_places import span_key
from fibkv.sealing import LayerSettings
from fibkv.slabs import Lanes, Slabs
from fibkv.store.base import Store
from fibkv.wire import Packing, PageReader

Span = tuple[tuple[Page, ...], int]
"""The pages of a span, one per layer, and the bytes that were read."""

# Groups of spans that are read at the same time: what is far away comes as fast as the network can, not as it answers.
AHEAD = 4
# Of them, how many are checked at the same time. More would wait for one another: a third of the work is Python's.
CHECKERS = 2
# Small spans are checked together, as many as fit the processor's caches: what it takes to begin comes once then.
GROUP_NBYTES, MAX_GROUP = 1 << 21, 16


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
        self._pack = None if slabs is None else _packing(settings, slabs, len(places))
        self._checking = BoundedSemaphore(CHECKERS)

    def read(self) -> Generator[Span | FibkvError | None]:
        """The spans in order, up to the first that is not there (None), or that was refused or not read (why)."""
        first = self._group(0, 1)
        yield from first
        if not first or not isinstance(first[0], tuple):
            return
        size = min(MAX_GROUP, max(1, GROUP_NBYTES // first[0][1]))
        starts = deque(range(1, len(self._places), size))
        with ThreadPoolExecutor(AHEAD, "fibkv-load") as loading:
            coming = deque(
                loading.submit(self._group, start, start + size)
                for start in (starts.popleft() for _ in range(min(AHEAD, len(starts))))
            )
            while coming:
                group = coming.popleft().result()
                if starts:
                    start = starts.popleft()
                    coming.append(loading.submit(self._group, start, start + size))
                yield from group
                if not isinstance(group[-1], tuple):
                    return

    def _group(self, start: int, stop: int) -> list[Span | FibkvError | None]:
        """Some spans, and why there are not more of them, if so."""
        places = self._places[start:stop]
        found: list[bytes] = []
        end: list[StoreError | None] = []
        try:
            for name, *_ in places:
                data = self._store.get(span_key(name))
                if data is None:
                    end.append(None)
                    break
                found.append(data)
        except StoreError as error:
            end.append(error)
        # Memory for pages outlives the caller's mode.
        with self._checking, torch.inference_mode(False):
            return [*self._checked(found, places[: len(found)]), *end]

    def _checked(self, found: Sequence[bytes], places: Sequence[Place]) -> list[Span | FibkvError]:
        if not found:
            return []
        try:
            pages = spans_from_bytes(found, places, self._readers, self._pack)
        except FibkvError as error:
            if len(found) == 1:
                return [error]
            # Which of them it is: those before it are sound.
            each = (self._checked([data], [place])[0] for data, place in zip(found, places, strict=True))
            return list(_until_refused(each))
        return list(zip(pages, map(len, found), strict=True))


def _until_refused(spans: Iterator[Span | FibkvError]) -> Iterator[Span | FibkvError]:
    for span in spans:
        yield span
        if isinstance(span, FibkvError):
            return


def _packing(settings: Sequence[LayerSettings], slabs: Slabs, spans: int) -> Packing | None:
    """Puts the codes of so many spans in the order of the layers' kernels, if these are native."""
    found = kernels.resolve(settings[0].keys.implementation, torch.device("cpu"))
    memory = Lanes(slabs, len(settings), spans)
    return partial(found.pack_bytes, memory=memory) if isinstance(found, Native) else None
