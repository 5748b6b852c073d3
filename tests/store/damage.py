"""Random damage to stored bytes, and the check that none of it goes unseen."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable

import pytest

from fibkv.errors import FibkvError

# 20,000 over all kinds of objects: FIBKV_FUZZ=10 pytest tests/store -k random_damage
SCALE = int(os.environ.get("FIBKV_FUZZ", "1"))


def corrupted(data: bytes, rng: random.Random) -> bytes:
    """One random damage: flipped bits, a wild number, a cut, an insertion, a swap of regions, a stretch of noise."""
    broken, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            broken[at] ^= 1 << rng.randrange(8)
        case 1:
            at = rng.randrange(0, 96, 2)
            broken[at : at + 8] = rng.getrandbits(64).to_bytes(8, "little")
        case 2:
            del broken[at:]
        case 3:
            broken[at:at] = rng.randbytes(rng.randrange(1, 200))
        case 4:
            stop = min(at + rng.randrange(1, 64), len(data))
            broken[at:stop] = bytes(reversed(broken[at:stop]))
        case _:
            stop = min(at + rng.randrange(1, 64), len(data))
            broken[at:stop] = rng.randbytes(stop - at)
    return bytes(broken)


def check_damage_is_seen(data: bytes, read: Callable[[bytes], object], *, count: int) -> None:
    """Every damage is refused in fibkv's words, before memory beyond its size and 1 MiB is taken."""
    rng = random.Random(0)
    read(data)
    tracemalloc.start()
    try:
        for _ in range(count * SCALE):
            broken = corrupted(data, rng)
            if broken == data:
                continue
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(FibkvError):
                read(broken)
            assert tracemalloc.get_traced_memory()[1] - before < len(broken) + (1 << 20)
    finally:
        tracemalloc.stop()
