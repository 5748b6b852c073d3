"""The pure read: how fast this machine gets bytes from memory, as the bound of whatever has to read them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from fibkv.kernels import native
from fibkv.machine import available_memory, last_level_cache

ROW = 1024
"""float32 numbers of a row; buffers and reads are whole rows."""
ROW_NBYTES = 4 * ROW
UNKNOWN_CACHE = 256 << 20
"""Taken for the last-level cache where the operating system does not report one."""
TRIALS = 5

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32 matrix @ vector": torch.mv,
    "float32 x . x": lambda rows, _: torch.dot(rows.view(-1), rows.view(-1)),
    "int8 maximum": lambda rows, _: rows.view(torch.int8).amax(),
}
"""The fastest reads found: each looks at every byte of ``rows [n, ROW]`` once. torch's sums over float or integer
tensors are slower than these, or as fast on one thread only."""
if native.why_not() == "yes":
    METHODS["native sum"] = lambda rows, _: torch.tensor(native.read(rows))


class PureRead:
    """A buffer that is read piece by piece, so that each read finds its bytes in memory, not in a cache.

    The fastest of `METHODS` is taken for each size, by trial on this machine.

    Args:
        nbytes: of the buffer; more than the last-level cache.
    """

    def __init__(self, nbytes: int) -> None:
        # Written, so that every page of it is memory of its own and not the operating system's one page of zeros.
        self._rows = torch.ones(-(-nbytes // ROW_NBYTES), ROW)
        self._vector = torch.ones(ROW)
        self._next = 0
        self._methods: dict[int, str] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._rows.nbytes

    def turn(self, nbytes: int) -> list[float]:
        """Seconds of one read of so many bytes (rounded up to whole rows, at most the buffer), the fastest method's."""
        return [self._timed(self.method(nbytes), nbytes)]

    def method(self, nbytes: int) -> str:
        """The fastest method for that size; found at the first call."""
        if nbytes not in self._methods:
            best = {name: min(self._timed(name, nbytes) for _ in range(TRIALS)) for name in METHODS}
            self._methods[nbytes] = min(best, key=best.__getitem__)
        return self._methods[nbytes]

    def sweep(self) -> None:
        """Reads the whole buffer: what the caches held before is gone afterwards."""
        torch.mv(self._rows, self._vector)

    def _timed(self, name: str, nbytes: int) -> float:
        count = min(-(-nbytes // ROW_NBYTES), len(self._rows))
        if self._next + count > len(self._rows):
            self._next = 0
        piece = self._rows[self._next : self._next + count]
        self._next += count
        started = perf_counter()
        METHODS[name](piece, self._vector)
        return perf_counter() - started


def cold_nbytes(wanted: int | None, operands: int) -> int:
    """How many bytes to read before an operand comes up again, so that no cache holds it any more.

    Args:
        wanted: by the user; None = twice the last-level cache (one that was read once in order is not yet gone
            from every cache).
        operands: how many buffers of that size are held at once: together at most half of the free memory.
    """
    if wanted is None:
        wanted = 2 * (last_level_cache() or UNKNOWN_CACHE)
    return min(wanted, available_memory() // (2 * operands))
