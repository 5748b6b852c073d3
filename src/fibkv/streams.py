"""Streams of a device beside the one that a model runs on, and the points at which one waits for the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point of a stream."""

    def synchronize(self) -> None:
        """Waits, on the host, until the stream has come there."""


class Stream(Protocol):
    """A stream beside the current one of a device."""

    def beside(self) -> AbstractContextManager[None]:
        """What is launched inside runs on this stream, behind all that the current one has been given so far."""

    def copy(self, into: Tensor, data: Tensor) -> None:
        """Copies bytes between a device and pinned memory; to be called inside of `beside`, and not waited for."""

    def mark(self) -> Mark:
        """The point that the stream has been given work up to."""

    def join(self, mark: Mark) -> None:
        """The current stream goes on behind a mark; the host does not wait."""

    def uses(self, *tensors: Tensor) -> None:
        """Memory of the current stream that this one works on: not given to others before it is done."""

    def pinned(self, *shape: int) -> Tensor:
        """Host memory ``[*shape]`` uint8 that devices copy from and to without the host."""


class SideStream:
    """A `Stream` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __deepcopy__(self, memo: dict[int, object]) -> SideStream:
        return self  # copies of a cache wait for each other's work at most

    def __reduce__(self) -> tuple[type[SideStream], tuple[torch.device]]:
        return SideStream, (self._device,)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """See `Stream.beside`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def copy(self, into: Tensor, data: Tensor) -> None:
        """See `Stream.copy`."""
        into.copy_(data, non_blocking=True)

    def mark(self) -> Mark:
        """See `Stream.mark`."""
        mark: Mark = self._stream.record_event()
        return mark

    def join(self, mark: Mark) -> None:
        """See `Stream.join`."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    def uses(self, *tensors: Tensor) -> None:
        """See `Stream.uses`."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def pinned(self, *shape: int) -> Tensor:
        """See `Stream.pinned`."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def side_stream(device: torch.device) -> Stream | None:
    """A new stream beside the current one of a device, or None where there are none: nothing runs beside the CPU."""
    return SideStream(device) if device.type == "cuda" else None
