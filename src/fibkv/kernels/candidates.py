"""Which codewords can be nearest to the points of a cell: what an exact search in the plane need look at.

A point that a scale search multiplies by several factors stays near one ray, so that one list serves all factors, and
each factor a *window* of it: for 256 codewords and five factors from 0.86 to 1.16 lists of six, of which a factor
looks at four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

SIDE = 64
"""Cells along an axis: their lists, 32 KiB, stay in a first-level cache."""

MOST = 7
"""Entries of a list: bytes of an int64 beside the sign, which stands for the whole book."""

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
# Of points that may fall into cells whose candidates do not fit into the windows: one in a million.
_RARE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Lists of codewords by cell of a square around the origin, for points before they are multiplied by a factor.

    Attributes:
        lists: ``[side * side]`` int64, row by row of the first coordinate: indices below 256, in bytes from the lowest
            one on; below 0 for a cell whose candidates do not fit in: it takes the whole book.
        extent: cells cover -extent..extent on both axes, and those at the border all that is beyond up to 1.
        side: cells along an axis.
        starts: of each factor's window, the first entry that it looks at.
        width: entries of a window.
    """

    lists: Tensor
    extent: float
    side: int
    starts: tuple[int, ...]
    width: int


def candidates(codewords: Tensor, scales: Sequence[float]) -> Candidates:
    """The lists of a codebook in the plane.

    A codeword is left out of a window only where another is nearer to all of the cell, times the factor, by more than
    float32 arithmetic errs.

    Args:
        codewords: ``[N, 2]`` float32, N at most 256; the lists are made on their device.
        scales: factors, positive.
    """
    words = codewords.to(torch.float64)
    extent = _BEYOND * float(words.abs().max()) / max(1.0, *scales)
    low, high = _edges(extent, words.device)
    cells = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).to(words.device)
    possible = [_possible(words, low[cells], high[cells], scale) for scale in scales]
    # Bit i of a candidate's set is set where it is one at factor i.
    sets = sum(found.to(torch.int64) << step for step, found in enumerate(possible))
    assert isinstance(sets, Tensor)
    spread = words.square().mean()
    weights = torch.exp(-((low[cells] + high[cells]) / 2).square().sum(1) / (2 * spread))
    starts, width, lists = _windows(sets.cpu(), weights.cpu() / float(weights.sum()), len(scales))
    return Candidates(lists.to(words.device), extent, SIDE, starts, width)


def _edges(extent: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cells of an axis begin and end, ``[SIDE]`` float64."""
    steps = torch.arange(SIDE, dtype=torch.float64, device=device)
    width = 2 * extent / SIDE
    low, high = (steps - _OVERLAP) * width - extent, (steps + 1 + _OVERLAP) * width - extent
    low[0], high[-1] = min(-_REACH, -extent), max(_REACH, extent)
    return low, high


def _possible(words: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
    """Whether each codeword can be nearest to a point of a rectangle ``low..high [C, 2]`` times scale: ``[C, N]``."""
    found = torch.zeros(len(low), len(words), dtype=torch.bool, device=words.device)
    middle, half = (high + low) / 2 * scale, (high - low) / 2 * scale
    distances, order = (middle[:, None] - words).square().sum(-1).topk(min(_NEAR, len(words)), largest=False)
    found.scatter_(1, order, ~_beaten(words, middle, half, order))
    # No point of a rectangle is farther from its middle than this.
    radius = half.square().sum(-1).sqrt()
    wide = (distances[:, 0].sqrt() + 2 * radius) * (1 + _MARGIN) >= distances[:, -1].sqrt()
    everything = torch.arange(len(words), device=words.device).expand(int(wide.sum()), -1)
    found[wide] = ~_beaten(words, middle[wide], half[wide], everything)
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


def _windows(sets: Tensor, weights: Tensor, num_scales: int) -> tuple[tuple[int, ...], int, Tensor]:
    """The least windows that the candidates of nearly all points fit into: starts, width, and the lists ``[C]`` int64.

    Args:
        sets: ``[C, N]`` int64, for each codeword the factors at which it is a candidate, as bits.
        weights: ``[C]``, the share of points in each cell.
        num_scales: how many factors there are.
    """
    members = [_sorted_members(cell) for cell in sets]
    shares: dict[tuple[int, ...], float] = {}
    for (pattern, _), weight in zip(members, weights.tolist(), strict=True):
        shares[pattern] = shares.get(pattern, 0.0) + weight
    # What is seldom there fits least: the first few decide.
    patterns = sorted(shares, key=lambda pattern: (-len(pattern), pattern))
    *cheaper, widest = _shapes(num_scales)
    for starts, width in cheaper:
        fits, missed = _fits(patterns, _reach(starts, width), shares, _RARE)
        if missed <= _RARE:
            break
    else:
        starts, width = widest
        fits, _ = _fits(patterns, _reach(starts, width), shares, 1.0)
    lists = [_packed(indices, fits[pattern]) for pattern, indices in members]
    return starts, width, torch.tensor(lists, dtype=torch.int64)


def _sorted_members(cell: Tensor) -> tuple[tuple[int, ...], list[int]]:
    """The sets of a cell's candidates, rising, and which codewords they are of."""
    indices = cell.nonzero().flatten()
    order = torch.argsort(cell[indices], stable=True)
    return tuple(cell[indices][order].tolist()), indices[order].tolist()


def _shapes(num_scales: int) -> list[tuple[tuple[int, ...], int]]:
    """Windows that move evenly along a list, the cheapest first: starts and widths."""
    found = []
    for width in range(1, MOST + 1):
        for room in range(min(num_scales, MOST - width + 1)):
            starts = tuple(round(step * room / max(1, num_scales - 1)) for step in range(num_scales))
            found.append((starts, width))
    return sorted(found, key=lambda shape: (num_scales * shape[1] + shape[0][-1], shape))


def _reach(starts: Sequence[int], width: int) -> tuple[int, ...]:
    """For each entry the factors that look at it, as bits."""
    entries = range(starts[-1] + width)
    return tuple(
        sum(1 << step for step, start in enumerate(starts) if start <= entry < start + width) for entry in entries
    )


def _fits(
    patterns: Sequence[tuple[int, ...]], reach: tuple[int, ...], shares: dict[tuple[int, ...], float], most: float
) -> tuple[dict[tuple[int, ...], dict[int, int] | None], float]:
    """How each pattern fits, and the share of those that do not; both incomplete once these are more than ``most``."""
    fits, missed = {}, 0.0
    for pattern in patterns:
        fits[pattern] = _fit(pattern, reach)
        if fits[pattern] is None:
            missed += shares[pattern]
            if missed > most:
                break
    return fits, missed


def _fit(pattern: tuple[int, ...], reach: tuple[int, ...]) -> dict[int, int] | None:
    """For entries which candidate of a pattern they hold; None if a factor cannot see all of its own."""
    if not pattern:
        return {}
    for step in range(max(reach).bit_length()):
        if sum(bits >> step & 1 for bits in pattern) > sum(bits >> step & 1 for bits in reach):
            return None
    for size in range(1, 4):
        for entries in combinations(range(len(reach)), size):
            seen = 0
            for entry in entries:
                seen |= reach[entry]
            if pattern[-1] & ~seen:
                continue
            # What was taken is seen by no factor any more.
            left = tuple(0 if entry in entries else bits for entry, bits in enumerate(reach))
            rest = _fit(pattern[:-1], left)
            if rest is not None:
                return rest | dict.fromkeys(entries, len(pattern) - 1)
    return None


def _packed(indices: Sequence[int], held: dict[int, int] | None) -> int:
    """A list as a number; entries that nobody needs repeat one that somebody does."""
    if held is None:
        return -1
    return sum(indices[held.get(entry, 0)] << (8 * entry) for entry in range(MOST))
