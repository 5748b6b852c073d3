"""Where the pages of one layer lie, and how they get there: made while the layer waits, or beside the model."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fibkv.ahead import Pending, begin
from fibkv.deferred import DeferredPages, Worker, defer, raw_nbytes
from fibkv.errors import ContractError
from fibkv.inventory import Inventory
from fibkv.offload import Archive, Offload
from fibkv.page import METADATA_NBYTES, Page
from fibkv.sealing import LayerSettings, Span, resident
from fibkv.slabs import Slabs
from fibkv.streams import Stream, side_stream
from fibkv.view import PageRows, Tail

# Layers of one cache whose pages are under way at a time: their raw tokens take memory until the pages are there.
MOST_LAYERS = 2


class Layer(Protocol):
    """The cache of a layer, as a line of them knows it."""

    def settle(self) -> bool:
        """Takes over its pages that are under way, if any."""


class PageMemory:
    """Pages where attention reads them, on the device of the layer. They are sealed while the layer waits.

    Args:
        slabs: the memory of packed pages.
        device: of the layer.
    """

    def __init__(self, slabs: Slabs, device: torch.device) -> None:
        self.device = device
        self._slabs = slabs

    def place(self, pages: Sequence[Page], implementation: str) -> list[Page]:
        """Pages that came from elsewhere, or were sealed while the layer waited, in their place."""
        return resident(pages, implementation, self._slabs, self.device)

    def begin(
        self,
        layer: Layer,  # noqa: ARG002 - for memories that can
        settings: LayerSettings,  # noqa: ARG002
        tail: Tail,  # noqa: ARG002
        length: int,  # noqa: ARG002
        spans: Sequence[Span],  # noqa: ARG002
        measured: bool,  # noqa: ARG002
    ) -> Pending | DeferredPages | None:
        """Begins to seal spans of a layer, see `fibkv.ahead.begin`; None = the layer must wait for each of them."""
        return None

    def reading(self, rows: PageRows) -> tuple[PageRows, object]:
        """Page tables as attention reads them, and what keeps them so while it lives."""
        return rows, None

    def tidied(self, rows: PageRows) -> PageRows:
        """Page tables of which pages are gone, with the others in less memory if that is worth it."""
        return rows

    def changed(self) -> None:
        """Pages were changed in place, as only tests of poison do."""

    def offloaded(self, pages: Iterable[Page]) -> tuple[int, int]:  # noqa: ARG002
        """Bytes of the pages' codes in host memory, if they were offloaded to it, and what is allocated there."""
        return 0, 0


class DeferringPageMemory(PageMemory):
    """Pages on the CPU, sealed by a worker.

    Args:
        slabs: as for `PageMemory`.
        device: of the layer.
        worker: of the cache.
    """

    def __init__(self, slabs: Slabs, device: torch.device, worker: Worker) -> None:
        super().__init__(slabs, device)
        self._worker = worker

    def begin(
        self,
        layer: Layer,  # noqa: ARG002
        settings: LayerSettings,
        tail: Tail,
        length: int,
        spans: Sequence[Span],
        measured: bool,
    ) -> DeferredPages | None:
        """See `PageMemory.begin`. What a sampler looks at, and what the worker may not hold, the layer waits for."""
        if settings.sampler is not None or raw_nbytes(tail, spans) > self._worker.most_nbytes:
            return None
        place = partial(self.place, implementation=settings.keys.implementation)
        return defer(settings, tail, length, spans, self._worker, place, measured)


class DevicePageMemory(PageMemory):
    """Pages in blocks on a device, sealed on a stream of its own.

    Each page has a block of torch's allocator, which hands blocks that have come back to new pages and to the model
    alike: regions of fibkv's own would keep what re-encoding sets free from both.

    Args:
        slabs: as for `PageMemory`.
        device: of the layer.
        stream: to seal on.
        line: the layers of the cache that are at it.
    """

    def __init__(self, slabs: Slabs, device: torch.device, stream: Stream, line: Line) -> None:
        super().__init__(slabs, device)
        self._stream = stream
        self._line = line

    def begin(
        self, layer: Layer, settings: LayerSettings, tail: Tail, length: int, spans: Sequence[Span], measured: bool
    ) -> Pending | None:
        """See `PageMemory.begin`. Pages that a sampler looks at are sealed while the layer waits."""
        if settings.sampler is not None:
            return None
        self._line.make_room()
        pending = begin(settings, tail, length, spans, self._stream, self, measured)
        self._line.add(layer)
        return pending

    def on_device(self, pages: int, nbytes: int) -> list[Tensor]:
        """See `fibkv.ahead.Room`."""
        return [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(pages)]

    def on_host(self, pages: int, nbytes: int) -> Tensor:
        """See `fibkv.ahead.Room`."""
        return self._stream.pinned(pages, nbytes)


class HostPageMemory(DevicePageMemory):
    """Pages in pinned host memory, of which attention reads copies on the device.

    Args:
        slabs: as for `PageMemory`.
        device: of the layer.
        line: as for `DevicePageMemory`.
        offload: the buffers on the device.
    """

    def __init__(self, slabs: Slabs, device: torch.device, line: Line, offload: Offload) -> None:
        # Copies to the device stand behind copies from it, on one stream: what was just sealed can be fetched.
        super().__init__(slabs, device, offload.stream, line)
        self.archive = Archive(offload.stream)
        self._offload = offload

    def place(self, pages: Sequence[Page], implementation: str) -> list[Page]:  # noqa: ARG002 - all read the same
        """See `PageMemory.place`."""
        return [self.archive.put(page) for page in pages]

    def on_device(self, pages: int, nbytes: int) -> list[Tensor]:  # noqa: ARG002
        """See `fibkv.ahead.Room`."""
        return []

    def on_host(self, pages: int, nbytes: int) -> Tensor:
        """See `fibkv.ahead.Room`."""
        return self.archive.take(pages, nbytes)

    def reading(self, rows: PageRows) -> tuple[PageRows, object]:
        """See `PageMemory.reading`."""
        return self._offload.read(self.archive, rows)

    def tidied(self, rows: PageRows) -> PageRows:
        """See `PageMemory.tidied`."""
        return self.archive.tidied(rows)

    def changed(self) -> None:
        """See `PageMemory.changed`."""
        self.archive.version += 1

    def offloaded(self, pages: Iterable[Page]) -> tuple[int, int]:
        """See `PageMemory.offloaded`."""
        return sum(page.nbytes - METADATA_NBYTES for page in pages), self.archive.allocated


class Line:
    """Layers of one cache whose pages are under way, the oldest first."""

    def __init__(self) -> None:
        self._layers: deque[weakref.ref[Layer]] = deque()

    def __deepcopy__(self, memo: dict[int, object]) -> Line:
        return Line()  # layers settle before they are copied

    def __reduce__(self) -> tuple[type[Line], tuple[()]]:
        return Line, ()

    def make_room(self) -> None:
        """Has the oldest layers take over their pages until one more may begin."""
        while len(self._layers) >= MOST_LAYERS:
            if (layer := self._layers.popleft()()) is not None:
                layer.settle()

    def add(self, layer: Layer) -> None:
        """Notes that pages of a layer are under way."""
        self._layers.append(weakref.ref(layer))


class PageMemories:
    """The memories of one cache, whose layers may lie on several devices.

    Args:
        inventory: of the cache, or of its pool.
        offloading: whether pages lie in host memory.
        deferred: whether pages on the CPU are sealed by a worker; on devices they are sealed beside the model anyway.
    """

    def __init__(self, inventory: Inventory, *, offloading: bool = False, deferred: bool = False) -> None:
        self.inventory = inventory
        self._offloading = offloading
        self._line = Line()
        self._worker = Worker() if deferred else None
        self._offloads: dict[torch.device, Offload | None] = {}

    def on(self, device: torch.device) -> PageMemory:
        """The memory of a layer on a device.

        Raises:
            ContractError: offloading from a device that has no streams.
        """
        if device not in self._offloads:
            stream = side_stream(device)
            self._offloads[device] = None if stream is None else Offload(device, stream)
        slabs, offload = self.inventory.slabs, self._offloads[device]
        if self._offloading:
            if offload is None:
                raise ContractError("Cache.offloading", "False, or a model on a CUDA device", str(device))
            return HostPageMemory(slabs, device, self._line, offload)
        if offload is not None:
            return DevicePageMemory(slabs, device, offload.stream, self._line)
        if self._worker is not None and device.type == "cpu":
            return DeferringPageMemory(slabs, device, self._worker)
        return PageMemory(slabs, device)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes on devices that hold copies of pages."""
        return sum(offload.nbytes for offload in self._offloads.values() if offload is not None)
