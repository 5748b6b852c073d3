"""The nearest codeword of each block: the search of the reference kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances computed at a time: 2**21 float32 stay inside the second-level cache.
SEARCH_TILE = 1 << 21


def nearest(blocks: Tensor, codewords: Tensor) -> Tensor:
    """Index of the nearest codeword (Euclid; ties: the lower index) of each block ``[n, k]``, as int32 ``[n]``.

    The squared distance is summed coordinate by coordinate rather than by a matrix product: every step is then
    exactly rounded, so the winner depends neither on the tile nor on the machine.
    """
    found = torch.empty(blocks.shape[0], dtype=torch.int32, device=blocks.device)
    tile = max(1, SEARCH_TILE // codewords.shape[0])
    for start in range(0, blocks.shape[0], tile):
        rows = blocks[start : start + tile]
        distance = torch.zeros(rows.shape[0], codewords.shape[0], device=blocks.device)
        for axis in range(codewords.shape[1]):
            difference = rows[:, axis, None] - codewords[:, axis]
            distance += difference.mul_(difference)
        found[start : start + tile] = distance.argmin(1)
    return found
