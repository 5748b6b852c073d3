"""Where the pages of one layer lie, and how they get there: made while the layer waits, or beside the model."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fibkv.ahead import Pending, begin
from fibkv.inventory import Inventory
from fibkv.page import Page
from fibkv.sealing import LayerSettings, Span, resident
from fibkv.slabs import Slabs
from fibkv.streams import Stream, side_stream
from fibkv.view import Tail

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
    ) -> Pending | None:
        """Begins to seal spans of a layer, see `fibkv.ahead.begin`; None = the layer must wait for each of them."""
        return None


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
    """

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self._line = Line()
        self._streams: dict[torch.device, Stream | None] = {}

    def on(self, device: torch.device) -> PageMemory:
        """The memory of a layer on a device."""
        if device not in self._streams:
            self._streams[device] = side_stream(device)
        slabs, stream = self.inventory.slabs, self._streams[device]
        return PageMemory(slabs, device) if stream is None else DevicePageMemory(slabs, device, stream, self._line)
