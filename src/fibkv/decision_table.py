"""Decision tables: the plane in small squares, and for each the codeword that is nearest to its middle.

Looking a codeword up in one costs a few operations however large the book is. Points near the border of two Voronoi
cells may get the second nearest codeword, which is hardly farther: at 256 codewords the error grows by less than 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fibkv.constants import constant

SIDE = 256


@dataclass(frozen=True, slots=True, eq=False)
class DecisionTable:
    """Codewords by cell of a square around the origin.

    Attributes:
        cells: ``[side, side]`` uint8, the index of a codeword; rows follow a point's first coordinate.
        extent: cells cover -extent..extent on both axes, and those at the border all that is beyond; exact in float32.
    """

    cells: Tensor
    extent: float

    @property
    def side(self) -> int:
        """Cells along an axis."""
        return self.cells.shape[0]

    def look_up(self, points: Tensor) -> Tensor:
        """Indices of codewords, int32 ``[n]``, for points ``[n, 2]`` float32.

        Every step is one float32 operation, so that the same point gives the same cell everywhere.
        """
        places = (points + self.extent) * (self.side / (2 * self.extent))
        row, column = places.to(torch.int32).clamp(0, self.side - 1).unbind(-1)
        return constant(self.cells, points.device)[row, column].to(torch.int32)


def decision_table(codewords: Tensor) -> DecisionTable:
    """The table of a codebook in the plane.

    Args:
        codewords: ``[N, 2]`` float32, N at most 256.
    """
    extent = float(codewords.abs().max())
    middles = ((torch.arange(SIDE, dtype=torch.float64) + 0.5) * (2 / SIDE) - 1) * extent
    x, y = codewords.to(torch.float64).unbind(-1)
    # Coordinate by coordinate in float64: exact enough that no machine decides otherwise. Row by row for the memory.
    across = (middles[:, None] - y).square()
    rows = [((middle - x).square() + across).argmin(1) for middle in middles]
    return DecisionTable(cells=torch.stack(rows).to(torch.uint8), extent=extent)
