"""Pages in pinned host memory, copied to the device while the layer before the one that reads them attends.

A layer's pages lie in a few regions of host memory (`Archive`). Attention reads copies of whole regions in a buffer on
the device (`Buffer`), which layers take in turn: the one that is read keeps its buffer until nothing can read it any
more, the next one is being filled meanwhile. Addresses in a buffer do not change while it serves the same layer, so
that what kernels have derived from them holds from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fibkv.blocks import Layout
from fibkv.codes import Codes
from fibkv.page import Page
from fibkv.streams import Mark, Stream
from fibkv.view import PageRows

# torch's allocator hands out pinned memory in powers of two.
LEAST_REGION = 1 << 20
# Regions that follow hold at least a part of what there is, so that they stay few.
REGION_PART = 4
# Room for growth in a buffer, as a part of it.
BUFFER_PART = 8
# Buffers that are kept although nothing reads them: one to read, one to fill.
SPARE_BUFFERS = 2


class Archive:
    """Host memory of one layer's pages: regions that are filled from the front, and go when their last page goes.

    Args:
        stream: that copies them.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.regions: list[Tensor] = []
        self.used: list[int] = []
        self.version = 0
        """Another one means that copies are out of date."""

    def __deepcopy__(self, memo: dict[int, object]) -> Archive:
        copied = Archive(self._stream)
        # What is free in the last region is the original's to fill.
        copied.regions = [region[:used] for region, used in zip(self.regions, self.used, strict=True)]
        copied.used = list(self.used)
        return copied

    def __reduce__(self) -> tuple[type[Archive], tuple[Stream]]:
        return Archive, (self._stream,)  # in another process pages are put there anew

    @property
    def allocated(self) -> int:
        """Bytes of all regions."""
        return sum(region.numel() for region in self.regions)

    def take(self, pages: int, nbytes: int) -> Tensor:
        """Room ``[pages, nbytes]`` uint8, contiguous."""
        wanted = pages * nbytes
        if not self.regions or self.used[-1] + wanted > self.regions[-1].numel():
            size = max(wanted, sum(self.used) // REGION_PART, LEAST_REGION)
            self.regions.append(self._stream.pinned(1 << (size - 1).bit_length()))
            self.used.append(0)
        start = self.used[-1]
        self.used[-1] += wanted
        return self.regions[-1][start : start + wanted].view(pages, nbytes)

    def put(self, page: Page) -> Page:
        """A page with its codes here."""
        if self.place_of(page) is not None:
            return page
        here = page.to(torch.device("cpu"))
        codes = codes_of(here)
        layout = Layout.of(codes)
        block = self.take(1, layout.nbytes)
        layout.write([one.map(lambda tensor: tensor[None]) for one in codes], block)
        return here.holding(layout.read(block[0], codes))

    def place_of(self, page: Page) -> tuple[int, int] | None:
        """The region of a page and its first byte in it; None = it lies elsewhere."""
        tensors = [tensor for one in codes_of(page) for _, tensor in one.named() if tensor.numel()]
        address = min(tensor.data_ptr() for tensor in tensors)
        for index, (region, used) in enumerate(zip(self.regions, self.used, strict=True)):
            if 0 <= address - region.data_ptr() < used:
                return index, address - region.data_ptr()
        return None

    def tidied(self, rows: PageRows) -> PageRows:
        """Page tables with their pages put together anew, if most of what is used here is of pages that are gone."""
        live = {id(page): page for row in rows for page in row}
        if sum(self.used) <= LEAST_REGION + 2 * sum(Layout.of(codes_of(page)).nbytes for page in live.values()):
            return rows
        self.regions, self.used = [], []
        self.version += 1
        moved = {key: self.put(page) for key, page in live.items()}
        return PageRows(tuple(moved[id(page)] for page in row) for row in rows)

    def starts(self) -> list[int]:
        """Where each region begins if the used parts lie one behind another; the last one ends there too."""
        starts = [0]
        for used in self.used:
            starts.append(starts[-1] + used)
        return starts


class Lease:
    """Whoever has it reads a buffer."""


@dataclass(eq=False)
class _Near:
    """What is known of an archive in a buffer, for as long as both are as they were.

    Attributes:
        version: of the archive.
        rows: the last page tables that were read, and the same with pages as they lie in the buffer.
        pages: pages of the archive, each as it lies there.
    """

    version: int
    rows: tuple[PageRows, PageRows] | None = None
    pages: weakref.WeakKeyDictionary[Page, Page] = field(default_factory=weakref.WeakKeyDictionary)


class Buffer:
    """Device memory for the pages of one layer at a time.

    Args:
        device: where.
        stream: that fills it.
    """

    def __init__(self, device: torch.device, stream: Stream) -> None:
        self.archive: weakref.ref[Archive] | None = None
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._stream = stream
        self._mark: Mark | None = None
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._version = 0
        self._filled: list[int] = []
        self._near: weakref.WeakKeyDictionary[Archive, _Near] = weakref.WeakKeyDictionary()

    @property
    def is_read(self) -> bool:
        """Whether anything can read it."""
        return len(self._leases) > 0

    def serves(self, archive: Archive) -> bool:
        """Whether it has pages of an archive."""
        return self.archive is not None and self.archive() is archive

    def fill(self, archive: Archive) -> None:
        """Begins to copy what it lacks of an archive; nothing may be reading it unless it serves that one."""
        starts = archive.starts()
        if not self.serves(archive) or self._version != archive.version or starts[-1] > self.memory.numel():
            self._empty(archive, starts[-1])
        self._filled += [0] * (len(archive.used) - len(self._filled))
        lacking = [index for index, used in enumerate(archive.used) if self._filled[index] < used]
        if not lacking:
            return
        with self._stream.beside():
            for index in lacking:
                first, stop = self._filled[index], archive.used[index]
                there = self.memory[starts[index] + first : starts[index] + stop]
                self._stream.copy(there, archive.regions[index][first:stop])
            self._mark = self._stream.mark()
        self._filled = list(archive.used)

    def read(self, archive: Archive, rows: PageRows) -> tuple[PageRows, Lease]:
        """Page tables of an archive that it has been filled with, as they lie here, for as long as the lease lives."""
        if self._mark is not None:
            self._stream.join(self._mark)
        near = self._near.get(archive)
        if near is None or near.version != archive.version:
            near = self._near[archive] = _Near(archive.version)
        if near.rows is None or near.rows[0] is not rows:
            starts = archive.starts()
            here = PageRows(tuple(self._page(near, archive, starts, page) for page in row) for row in rows)
            near.rows = rows, here
        lease = Lease()
        self._leases.add(lease)
        return near.rows[1], lease

    def _empty(self, archive: Archive, nbytes: int) -> None:
        if nbytes > self.memory.numel() or self.is_read:
            self.memory = self.memory.new_empty(nbytes + nbytes // BUFFER_PART)
            self._stream.uses(self.memory)
            self._near.clear()
        self.archive, self._version, self._filled = weakref.ref(archive), archive.version, []

    def _page(self, known: _Near, archive: Archive, starts: Sequence[int], page: Page) -> Page:
        near = known.pages.get(page)
        if near is None:
            place = archive.place_of(page)
            assert place is not None  # pages of an offloaded layer lie in its archive
            codes = codes_of(page)
            layout, first = Layout.of(codes), starts[place[0]] + place[1]
            near = page.holding(layout.read(self.memory[first : first + layout.nbytes], codes))
            known.pages[page] = near
        return near


class Offload:
    """The buffers of one device, which the layers of one cache take in turn.

    Args:
        device: that attention is on.
        stream: that copies.
    """

    def __init__(self, device: torch.device, stream: Stream) -> None:
        self.device = device
        self.stream = stream
        self._buffers: list[Buffer] = []
        self._layers: list[weakref.ref[Archive]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Offload:
        return Offload(self.device, self.stream)

    def __reduce__(self) -> tuple[type[Offload], tuple[torch.device, Stream]]:
        return Offload, (self.device, self.stream)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.memory.numel() for buffer in self._buffers)

    def read(self, archive: Archive, rows: PageRows) -> tuple[PageRows, object]:
        """Page tables of a layer as they lie on the device, and what keeps them there; then its successor is fetched.

        The host waits for nothing; the model's stream waits for what has not been copied yet.
        """
        layers = self._in_turn(archive)
        if not any(rows):
            return rows, None
        buffer = self._buffer_for(archive)
        buffer.fill(archive)
        near, lease = buffer.read(archive, rows)
        follower = layers[(layers.index(archive) + 1) % len(layers)]
        if follower is not archive and follower.regions:
            self._buffer_for(follower).fill(follower)
        return near, lease

    def _in_turn(self, archive: Archive) -> list[Archive]:
        """The layers in the order in which they were read first."""
        layers = [layer for known in self._layers if (layer := known()) is not None]
        if not any(layer is archive for layer in layers):
            layers.append(archive)
        if len(layers) != len(self._layers):
            self._layers = [weakref.ref(layer) for layer in layers]
        return layers

    def _buffer_for(self, archive: Archive) -> Buffer:
        """The buffer that serves a layer, or the one that nothing reads and that was used longest ago."""
        unread = [buffer for buffer in self._buffers if not buffer.is_read]
        for buffer in unread[:-SPARE_BUFFERS]:
            self._buffers.remove(buffer)
        serving = [buffer for buffer in self._buffers if buffer.serves(archive)]
        chosen = next(iter((*serving, *unread[-SPARE_BUFFERS:])), None) or Buffer(self.device, self.stream)
        self._buffers = [*(buffer for buffer in self._buffers if buffer is not chosen), chosen]
        return chosen


def codes_of(page: Page) -> list[Codes]:
    """The codes of a page's segments."""
    return [codes.canonical() for codes in page.held]
