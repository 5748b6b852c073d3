"""Memory that is asked for beside the thread that fills it."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from fibkv import populate
from fibkv.kernels.native import why_not
from fibkv.populate import LEAST_NBYTES, Populating
from fibkv.slabs import Slabs
from tests.pool.memory import resident_nbytes

pytestmark = [
    pytest.mark.skipif(why_not() != "yes", reason=why_not()),
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for memory"),
]
NBYTES, BLOCKS, LANES = 1 << 20, 40, 2


def lanes_of(slabs: Slabs) -> list[list[torch.Tensor]]:
    blocks = slabs.take(NBYTES, LANES * BLOCKS)
    return [blocks[:BLOCKS], blocks[BLOCKS:]]


def test_memory_is_there_before_it_is_written_to_and_holds_what_was_written() -> None:
    assert LANES * BLOCKS * NBYTES > LEAST_NBYTES
    lanes = lanes_of(Slabs())
    before = resident_nbytes()
    lanes[0][3].fill_(7)
    if not populate.extension.populate(lanes[1][0].data_ptr(), 1 << 16):
        pytest.skip("this system gives memory only as it is written to")
    populating = Populating()
    populating.begin(lanes)
    lanes[1][5].fill_(9)
    wanted = before + (LANES * BLOCKS - 4) * NBYTES
    deadline = time.monotonic() + 30
    while resident_nbytes() < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    populating.end()
    assert resident_nbytes() >= wanted
    assert bool((lanes[0][3] == 7).all())
    assert bool((lanes[1][5] == 9).all())


def test_no_memory_is_asked_for_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Slow:
        def populate(self, address: int, nbytes: int) -> bool:
            asked.append(nbytes)
            time.sleep(0.05)
            return True

    monkeypatch.setattr(populate, "extension", Slow())
    populating = Populating()
    populating.begin(lanes_of(Slabs()))
    populating.end()
    assert len(asked) <= 1
    few = Populating()
    few.begin([[torch.empty(NBYTES, dtype=torch.uint8)]])
    few.end()
    assert len(asked) <= 1
