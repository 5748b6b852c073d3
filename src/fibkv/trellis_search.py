"""What the encoder of a trellis code looks at: for each place of a coordinate, the few levels worth trying.

Labels of one *row*, those that agree in all but the b oldest bits of their windows, lie far apart, like the levels of a
scalar quantizer of b bits. From all states of a group a symbol leads through one row, so that only the row's levels
nearest to the coordinate can be on a good path. Coordinates are rounded to *cells* for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CELLS_PER_UNIT = 128
"""Cells in the standard deviation of a coordinate."""

REACH = 511
"""The largest coordinate that is told from larger ones, in cells."""

MOST = {2: 127, 3: 255}
"""The largest cost, of one step and of a path, by the ways that are tried: sums stay there. Of two ways, a byte also
has room to say which one it was."""

INTERVAL = {2: 8, 3: 2}
"""At every so many coordinates the least cost before it is taken off, by the ways: not sooner than it must."""

# Squared distances in steps of the levels' grid are divided by 2^this. Costs of states differ by dozens of times the
# distortion of a coordinate: so they fill eight bits. With two ways steps are twice as large.
_COST_SHIFT = {2: 18, 3: 16, 4: 15}


@dataclass(frozen=True, slots=True, eq=False)
class SearchTable:
    """The levels that the encoder tries in each cell.

    Attributes:
        columns: ``[2 * REACH + 1, W, R]`` uint8: of each of the R rows of labels, the b low bits of the labels
            of its W levels nearest to the cell, in rising order.
        costs: likewise: their squared distances less the smallest one of all labels, at most `MOST`.
    """

    columns: Tensor
    costs: Tensor


def search_table(bits: int, levels: Tensor, grid: int, ways: int) -> SearchTable:
    """The table of a code.

    Args:
        bits: b.
        levels: ``[2^m]`` int32 of all labels, in steps.
        grid: steps in a unit, a multiple of CELLS_PER_UNIT.
        ways: W, 2 or 3: more find nothing better.
    """
    rows = levels.to(torch.int64).view(-1, 1 << bits)
    points = torch.arange(-REACH, REACH + 1).view(-1, 1, 1) * (grid // CELLS_PER_UNIT)
    distances = (points - rows).square()
    columns = distances.argsort(dim=2, stable=True)[:, :, :ways].sort(dim=2).values
    shift = _COST_SHIFT[bits] + (ways == 2)
    costs = distances + (1 << shift - 1) >> shift
    costs = (costs - costs.amin((1, 2), keepdim=True)).clamp(max=MOST[ways]).gather(2, columns)
    return SearchTable(*(tensor.transpose(1, 2).to(torch.uint8).contiguous() for tensor in (columns, costs)))
