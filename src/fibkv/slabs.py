"""Memory for packed pages: slabs of equal blocks, and a free list.

Pages that are sealed together lie one behind another. Memory delivers long sequential reads about twice as fast as
scattered pages, more so on huge pages, which large slabs ask the kernel for.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2 << 20
# A block taken alone brings others with it: one more for each of so many blocks in use, so that slack stays small.
GROWTH = 32


class Slabs:
    """Blocks for the pages of one cache.

    A block returns to the free list when its last page is gone. Safe to use from several threads.
    """

    def __init__(self) -> None:
        # Re-entrant: the garbage collector may return blocks in the middle of `take`, on the same thread.
        self._lock = threading.RLock()
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._used: dict[int, int] = defaultdict(int)

    def __deepcopy__(self, memo: dict[int, object]) -> Slabs:
        return self  # pages are shared between copies, and so is their memory

    def __reduce__(self) -> tuple[type[Slabs], tuple[()]]:
        return Slabs, ()  # in another process pages are allocated anew

    @property
    def slack_nbytes(self) -> int:
        """Bytes of free blocks: allocated, and used by no page."""
        with self._lock:
            return sum(size * len(blocks) for size, blocks in self._free.items())

    def take(self, nbytes: int, count: int) -> list[Tensor]:
        """Blocks.

        Args:
            nbytes: of a block; rounded up to `ALIGNMENT`.
            count: how many are needed now; they follow one another where they are new.

        Returns:
            ``count`` tensors ``[nbytes]`` uint8, uninitialized.
        """
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            free = self._free[size]
            missing = count - len(free)
            if missing > 0:
                free.extend(_slab(size, max(missing, self._used[size] // GROWTH)))
            taken, self._free[size] = free[:count], free[count:]
            self._used[size] += count
        return [self._lend(block, nbytes) for block in taken]

    def _lend(self, block: Tensor, nbytes: int) -> Tensor:
        lent = block[:nbytes]
        weakref.finalize(lent, _give_back, weakref.ref(self), block)
        return lent

    def _return(self, block: Tensor) -> None:
        with self._lock:
            self._free[block.numel()].append(block)
            self._used[block.numel()] -= 1


def _give_back(slabs: weakref.ref[Slabs], block: Tensor) -> None:
    if (owner := slabs()) is not None:
        owner._return(block)


def _slab(size: int, count: int) -> list[Tensor]:
    """``count`` new blocks of ``size`` bytes that lie one behind another."""
    nbytes = size * count
    if nbytes < HUGE_PAGE:
        return list(torch.empty(nbytes, dtype=torch.uint8).split(size))
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return list(torch.frombuffer(memory, dtype=torch.uint8).split(size))
