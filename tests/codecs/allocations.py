"""Allocations of bits for tests of klt codes."""

from __future__ import annotations

from fibkv.allocation import HeadAllocation, KltParameters


def head_of(eights: int, sixes: int, fours: int, twos: int, zeros: int) -> HeadAllocation:
    """So many pairs of each width; every pair is a half octave below the one before it."""
    bits = (8,) * eights + (6,) * sixes + (4,) * fours + (2,) * twos + (0,) * zeros
    return HeadAllocation(bits=bits, half_octaves=tuple(range(len(bits))))


def klt_of(*heads: tuple[int, int, int, int, int], scale_search: bool = True) -> KltParameters:
    """Parameters from the numbers of pairs of each width, head by head."""
    return KltParameters(head_dim=2 * sum(heads[0]), heads=tuple(head_of(*h) for h in heads), scale_search=scale_search)


# 132 bits in 64 coordinates, not a whole number of bytes.
ONE_HEAD = klt_of((4, 8, 10, 6, 4))
# 128 bits in 64 coordinates.
TWO_HEADS = klt_of((8, 4, 8, 4, 8), (2, 8, 13, 6, 3))
