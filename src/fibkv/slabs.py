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
from collections.abc import Callable, Sequence
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
        # By their identity: references to tensors are compared as tensors are.
        self._loans: dict[int, _Loan] = {}
        self._returned: deque[_Loan] = deque()
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
        whole = memory[taken.start : taken.start + size * count].view(count, size)
        blocks = list(whole[:, :nbytes].unbind(0))
        for index, block in enumerate(blocks):
            loan = _Loan(block, self._returned.append)
            loan.block = Taken(taken.region, taken.start + size * index, size)
            self._loans[id(loan)] = loan
        return blocks

    def _settle(self) -> None:
        """Sees to the blocks that have come back; needs the lock."""
        if not self._returned:
            return
        while self._returned:
            loan = self._returned.popleft()
            del self._loans[id(loan)]
            released = self._ranges.give(loan.block)
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


class _Loan(weakref.ref[Tensor]):
    """A block's tensor, with what comes back when it is gone: one object where `weakref.finalize` makes six."""

    __slots__ = ("block",)

    block: Taken


class Lanes:
    """Blocks that are taken in rounds, some for each lane: those of a lane follow one another.

    Pages of a prefix come span by span, a page for each layer, and are read layer by layer. Safe to use from several
    threads.

    Args:
        slabs: where the blocks come from.
        lanes: how many.
        blocks: of each lane, in all rounds.
        taken: told of the blocks of each lane that are taken ahead.
    """

    def __init__(
        self, slabs: Slabs, lanes: int, blocks: int, taken: Callable[[Sequence[Sequence[Tensor]]], None] | None = None
    ) -> None:
        self._slabs = slabs
        self._taken = taken or (lambda _: None)
        self._lanes = lanes
        self._left = blocks
        self._lock = threading.Lock()
        self._ready: dict[int, list[deque[Tensor]]] = {}

    def take(self, nbytes: int, count: int) -> list[Tensor]:
        """A round: equally many blocks for each lane, one lane after another.

        What is asked for twice gets memory for all that is to come. What is not for every lane is taken as it comes.
        """
        each, rest = divmod(count, self._lanes)
        if rest:
            return self._slabs.take(nbytes, count)
        with self._lock:
            left, self._left = max(each, self._left), self._left - each
            if nbytes not in self._ready:
                self._ready[nbytes] = [deque()] * self._lanes
                return self._slabs.take(nbytes, count)
            if len(self._ready[nbytes][0]) < each:
                blocks = self._slabs.take(nbytes, left * self._lanes)
                self._ready[nbytes] = [deque(blocks[lane * left :][:left]) for lane in range(self._lanes)]
                self._taken(self._ready[nbytes])
            return [lane.popleft() for lane in self._ready[nbytes] for _ in range(each)]


def block_nbytes(nbytes: int) -> int:
    """What a block of ``nbytes`` takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _mapped(form: RegionForm) -> tuple[mmap.mmap, Tensor]:
    """Address space; memory comes with the first write to each of its grains."""
    memory = mmap.mmap(-1, form.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if form.huge else mmap.MADV_NOHUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)
