"""Memory for packed pages: regions of address space, from which pages are cut and to which they return.

Pages that are sealed together lie one behind another: memory delivers long sequential reads about twice as fast as
scattered pages, more so on huge pages, which large regions ask the kernel for. What no page touches any more goes back
to the operating system in whole grains (`fibkv.ranges`), so that a cache which was compressed further is smaller.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fibkv.ranges import Ranges, RegionForm, Released, Taken

ALIGNMENT = 64


class Blocks(Protocol):
    """Where blocks of memory come from."""

    def take(self, nbytes: int, count: int) -> list[Tensor]:
        """``count`` tensors ``[nbytes]`` uint8, uninitialized."""


class Slabs:
    """Blocks for the pages of one cache, or of many. Safe to use from several threads.

    A block is returned when its tensor is gone. The garbage collector may find that out in the middle of `take`, on
    the same thread: it only makes a note, and the next call sees to it.

    Args:
        watch: called, under the lock, with the bytes that exist whenever they have changed.
    """

    def __init__(self, watch: Callable[[int], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._ranges = Ranges()
        self._memory: dict[int, tuple[mmap.mmap, Tensor]] = {}
        self._returned: deque[Taken] = deque()
        self._watch = watch or (lambda _: None)

    def __deepcopy__(self, memo: dict[int, object]) -> Slabs:
        return self  # pages are shared between copies, and so is their memory

    def __reduce__(self) -> tuple[type[Slabs], tuple[()]]:
        return Slabs, ()  # in another process pages are allocated anew

    @property
    def slack_nbytes(self) -> int:
        """Bytes that exist and belong to no page."""
        with self._lock:
            self._settle()
            return self._ranges.allocated - self._ranges.used

    @property
    def used_nbytes(self) -> int:
        """Bytes of blocks."""
        with self._lock:
            self._settle()
            return self._ranges.used

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that exist: blocks and slack."""
        with self._lock:
            self._settle()
            return self._ranges.allocated

    def take(self, nbytes: int, count: int) -> list[Tensor]:
        """Blocks that follow one another.

        Args:
            nbytes: of a block; rounded up to `ALIGNMENT`.
            count: of blocks.

        Returns:
            ``count`` tensors ``[nbytes]`` uint8, uninitialized.
        """
        size = block_nbytes(nbytes)
        with self._lock:
            self._settle()
            taken = self._ranges.take(size * count)
            memory = self._memory_of(taken.region)
            self._watch(self._ranges.allocated)
        return [self._lend(memory, Taken(taken.region, taken.start + size * i, size), nbytes) for i in range(count)]

    def _lend(self, memory: Tensor, block: Taken, nbytes: int) -> Tensor:
        lent = memory[block.start : block.start + nbytes]
        weakref.finalize(lent, self._returned.append, block).atexit = False
        return lent

    def _settle(self) -> None:
        """Sees to the blocks that have come back; needs the lock."""
        if not self._returned:
            return
        while self._returned:
            released = self._ranges.give(self._returned.popleft())
            if released is not None:
                self._release(released)
        self._watch(self._ranges.allocated)

    def _release(self, released: Released) -> None:
        if released.nbytes == 0:
            del self._memory[released.region]
        elif hasattr(mmap, "MADV_DONTNEED"):
            self._memory[released.region][0].madvise(mmap.MADV_DONTNEED, released.start, released.nbytes)

    def _memory_of(self, region: int) -> Tensor:
        if region not in self._memory:
            self._memory[region] = _mapped(self._ranges.form_of(region))
        return self._memory[region][1]


class Lanes:
    """Blocks that are taken round by round, one for each lane: those of a lane follow one another.

    Pages of a prefix come span by span, a page for each layer, and are read layer by layer. Safe to use from several
    threads.

    Args:
        slabs: where the blocks come from.
        rounds: how many there will be.
    """

    def __init__(self, slabs: Slabs, rounds: int) -> None:
        self._slabs = slabs
        self._left = rounds
        self._lock = threading.Lock()
        self._ready: dict[tuple[int, int], deque[list[Tensor]]] = {}

    def take(self, nbytes: int, lanes: int) -> list[Tensor]:
        """A round of ``lanes`` blocks. What is asked for twice gets memory for all rounds that are left."""
        with self._lock:
            left, self._left = max(1, self._left), self._left - 1
            ready = self._ready.get((nbytes, lanes))
            if ready is None:
                self._ready[nbytes, lanes] = deque()
                return self._slabs.take(nbytes, lanes)
            if not ready:
                blocks = self._slabs.take(nbytes, lanes * left)
                ready.extend(blocks[index::left] for index in range(left))
            return ready.popleft()


def block_nbytes(nbytes: int) -> int:
    """What a block of ``nbytes`` takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _mapped(form: RegionForm) -> tuple[mmap.mmap, Tensor]:
    """Address space; memory comes with the first write to each of its grains."""
    memory = mmap.mmap(-1, form.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if form.huge else mmap.MADV_NOHUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)
