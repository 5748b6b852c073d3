"""Which codewords can be nearest to the points of a cell: what an exact search in the plane need look at.

A point that a scale search multiplies by several factors stays near one ray, so that one list serves all factors: for
256 codewords and five factors from 0.86 to 1.16 it has at most six entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64
MOST = 8
"""Entries of a list: as many bytes as an int64 has."""

# Squared distances in float32 err by four roundings of 2^-24 each, relative to themselves.
_MARGIN = 2e-6
# Points are put into cells in float32, which errs by far less than this part of a cell.
_OVERLAP = 1e-3
# Beyond the coordinates of unit vectors, with room for rounding.
_REACH = 1.001
# Cells reach so much farther than the codewords, since those on the border have the longest lists.
_BEYOND = 1.3
# Codewords near the middle of a cell, of which one is nearer to all of it than most others are.
_RIVALS = 8
# Codewords near the middle of a cell, beyond which there is seldom a candidate.
_NEAR = 24


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Lists of codewords by cell of a square around the origin, for points before they are multiplied by a factor.

    Attributes:
        lists: ``[side * side]`` int64, row by row of the first coordinate: indices below 256, rising from the lowest
            byte on; the last one is repeated. A list that would be longer than ``slots`` is 1 and 0, falling, instead:
            it stands for the whole book.
        extent: cells cover -extent..extent on both axes, and those at the border all that is beyond up to 1.
        side: cells along an axis.
        slots: entries that a list has at most.
    """

    lists: Tensor
    extent: float
    side: int
    slots: int


def candidates(codewords: Tensor, scales: Sequence[float]) -> Candidates:
    """The lists of a codebook in the plane.

    A codeword is left out of a cell only where another is nearer to all of it, times each factor, by more than float32
    arithmetic errs.

    Args:
        codewords: ``[N, 2]`` float32, N at most 256; the lists are made on their device.
        scales: factors, positive.
    """
    words = codewords.to(torch.float64)
    extent = _BEYOND * float(words.abs().max()) / max(1.0, *scales)
    low, high = _edges(extent, words.device)
    cells = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).to(words.device)
    possible = _possible(words, low[cells], high[cells], scales)
    lengths = possible.sum(1)
    inner = ((cells > 0) & (cells < SIDE - 1)).all(1)
    slots = min(int(lengths[inner].max()), MOST)
    return Candidates(_packed(possible, slots), extent, SIDE, slots)


def _edges(extent: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cells of an axis begin and end, ``[SIDE]`` float64."""
    steps = torch.arange(SIDE, dtype=torch.float64, device=device)
    width = 2 * extent / SIDE
    low, high = (steps - _OVERLAP) * width - extent, (steps + 1 + _OVERLAP) * width - extent
    low[0], high[-1] = min(-_REACH, -extent), max(_REACH, extent)
    return low, high


def _possible(words: Tensor, low: Tensor, high: Tensor, scales: Sequence[float]) -> Tensor:
    """Whether each codeword can be nearest to a point of each rectangle ``low..high [C, 2]``: bool ``[C, N]``."""
    found = torch.zeros(len(low), len(words), dtype=torch.bool, device=words.device)
    for scale in scales:
        middle, half = (high + low) / 2 * scale, (high - low) / 2 * scale
        distances, order = (middle[:, None] - words).square().sum(-1).topk(min(_NEAR, len(words)), largest=False)
        # No point of a rectangle is farther from its middle than this.
        radius = half.square().sum(-1).sqrt()
        reached = (distances[:, 0].sqrt() + 2 * radius) * (1 + _MARGIN)
        wide = reached >= distances[:, -1].sqrt()
        found.scatter_(1, order, found.gather(1, order) | ~_beaten(words, middle, half, order))
        everything = torch.arange(len(words), device=words.device).expand(int(wide.sum()), -1)
        found[wide] |= ~_beaten(words, middle[wide], half[wide], everything)
    return found


def _beaten(words: Tensor, middle: Tensor, half: Tensor, order: Tensor) -> Tensor:
    """Whether another codeword is nearer to all of a rectangle than each of ``order [C, n]``: bool ``[C, n]``."""
    apart = middle[:, None] - words[order]
    distances = apart.square().sum(-1)
    farthest = (apart.abs() + half[:, None]).square().sum(-1)
    beaten = torch.zeros_like(distances, dtype=torch.bool)
    for rival in distances.topk(min(_RIVALS, order.shape[1]), largest=False).indices.T:
        # The difference of two squared distances is linear: half times its slope is how far it falls.
        slope = 2 * (words[order] - words[order.gather(1, rival[:, None])]).abs()
        lead = distances - distances.gather(1, rival[:, None]) - (slope * half[:, None]).sum(-1)
        beaten |= lead > _MARGIN * farthest.gather(1, rival[:, None])
    return beaten


def _packed(possible: Tensor, slots: int) -> Tensor:
    lengths = possible.sum(1, keepdim=True)
    # Indices of candidates before all others, both rising.
    order = torch.argsort(~possible, dim=1, stable=True)
    order = torch.nn.functional.pad(order, (0, max(0, MOST - order.shape[1])))
    places = torch.arange(MOST, device=possible.device).minimum(lengths - 1)
    entries = order.gather(1, places)
    whole_book = torch.arange(MOST, device=possible.device) == 0
    entries = torch.where(lengths > slots, whole_book.to(entries.dtype), entries)
    shifts = 8 * torch.arange(MOST, device=possible.device)
    return (entries << shifts).sum(1)
