"""A stream beside the CPU: copies happen when they are waited for, and until then there is something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fibkv.offload import Offload
from fibkv.page_memory import DevicePageMemory, HostPageMemory, Line
from fibkv.slabs import Slabs

POISON = 0xA5


class LateMark:
    def __init__(self, stream: LateStream) -> None:
        self._stream = stream
        self._copies = len(stream.copies)

    def synchronize(self) -> None:
        self._stream.waits += 1
        self.reach()

    def reach(self) -> None:
        for at, (into, data) in enumerate(self._stream.copies[: self._copies]):
            if data is not None:
                into.copy_(data)
                self._stream.copies[at] = (into, None)


class LateStream:
    """Counts what is waited for on the host, and what the current stream waits for."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor | None]] = []
        self.inside = False
        self.waits = 0
        self.joins = 0

    def __deepcopy__(self, memo: dict[int, object]) -> LateStream:
        return self

    def __reduce__(self) -> tuple[type[LateStream], tuple[()]]:
        return LateStream, ()

    @contextmanager
    def beside(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def copy(self, into: Tensor, data: Tensor) -> None:
        assert self.inside
        assert into.dtype == data.dtype == torch.uint8
        assert into.shape == data.shape
        into.fill_(POISON)
        self.copies.append((into, data))

    def mark(self) -> LateMark:
        return LateMark(self)

    def join(self, mark: LateMark) -> None:
        self.joins += 1
        mark.reach()

    def uses(self, *tensors: Tensor) -> None:
        assert not self.inside, "what the other stream uses is told before"

    def pinned(self, *shape: int) -> Tensor:
        return torch.full(shape, POISON, dtype=torch.uint8)


def late_memory(slabs: Slabs, device: torch.device) -> DevicePageMemory:
    """A memory that seals beside the CPU, in place of `fibkv.page_memory.PageMemory`."""
    return DevicePageMemory(slabs, device, LateStream(), Line())


def offloaded_memory(slabs: Slabs, device: torch.device) -> HostPageMemory:
    """A memory that keeps pages apart from what is read, in place of `fibkv.page_memory.PageMemory`."""
    return HostPageMemory(slabs, device, Line(), Offload(device, LateStream()))
