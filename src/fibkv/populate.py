"""Memory that the system clears on another core, ahead of what is written to it.

Memory that was never touched costs more than what is done with it: the system clears it when it is first written to,
and a virtual machine may have to ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Thread

from torch import Tensor

from fibkv.kernels.native_sides import extension

# Bytes of a lane that are asked for at a time: a huge page.
STEP_NBYTES = 1 << 21
# Below, a thread is not worth it.
LEAST_NBYTES = 1 << 26


class Populating:
    """Asks for the memory of blocks beside the thread that fills them."""

    def __init__(self) -> None:
        self._ended = Event()
        self._threads: list[Thread] = []

    def begin(self, lanes: Sequence[Sequence[Tensor]]) -> None:
        """Begins with the first blocks of all lanes.

        Args:
            lanes: blocks ``[nbytes]`` uint8 on the CPU; those of a lane follow one another.
        """
        ends = [(lane[0].data_ptr(), lane[-1].data_ptr() + lane[-1].nbytes) for lane in lanes]
        if extension is None or sum(stop - start for start, stop in ends) < LEAST_NBYTES:
            return
        # The blocks are the caller's, who ends this before they can go.
        thread = Thread(target=self._run, args=(ends,), name="fibkv-populate", daemon=True)
        thread.start()
        self._threads.append(thread)

    def end(self) -> None:
        """Returns when no memory is asked for any more."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, ends: Sequence[tuple[int, int]]) -> None:
        longest = max(stop - start for start, stop in ends)
        for offset in range(0, longest, STEP_NBYTES):
            for start, stop in ends:
                nbytes = min(STEP_NBYTES, stop - start - offset)
                if self._ended.is_set() or (nbytes > 0 and not extension.populate(start + offset, nbytes)):
                    return
