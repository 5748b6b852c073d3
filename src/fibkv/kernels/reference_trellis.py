"""Trellis codes in plain torch: windows of symbols, and the search for the best path. Part of the reference kernels.

Letters: ``b`` bits of a symbol, ``n`` = 2^b, ``G`` = 2^(8 - b), ``V`` vectors. A *state* is the newest 8 bits, the last
symbol in the highest. From state ``g * n + j`` the symbol ``s`` leads through window ``s * 256 + g * n + j`` to state
``s * G + g``: the n states of a *group* g lead to the same n states.

All costs are integers of eight bits, so that every implementation finds the same path.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fibkv.constants import constant
from fibkv.trellis import STATE_BITS, Trellis, TrellisCode
from fibkv.trellis_search import INTERVAL, MOST, REACH

STATES = 1 << STATE_BITS
# Vectors searched at a time: on the CPU so that the costs of a step stay inside the second-level cache; on a device,
# where a step is a dozen launches whatever its size, so that they stay below 256 MiB.
SEARCH_TILE, DEVICE_TILE = 128, 1 << 14


def windows(symbols: Tensor, code: TrellisCode) -> Tensor:
    """The windows ``[..., d]`` int64 of symbols ``[..., d]``: the newest L bits, the last symbol in the highest."""
    found = torch.zeros_like(symbols, dtype=torch.int64)
    for age in range(-(-code.window_bits // code.bits)):
        place = STATE_BITS - code.bits * age
        older = symbols.roll(age, dims=-1).to(torch.int64)
        # Of the oldest symbol, the window may hold the high bits only.
        found |= older << place if place >= 0 else older >> -place
    return found


def symbols(vectors: Tensor, trellis: Trellis) -> Tensor:
    """Symbols ``[..., d]`` int32 of rotated unit vectors ``[..., d]`` float32.

    Two searches: a free one over the coordinates around the seam, where the vector closes to a ring, says which state
    to have there; then one over the vector, from this state and back to it.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    tile = SEARCH_TILE if flat.device.type == "cpu" else DEVICE_TILE
    tiles = [_tile_symbols(rows, trellis) for rows in flat.split(tile)]
    return torch.cat(tiles).view(vectors.shape)


def _tile_symbols(rows: Tensor, trellis: Trellis) -> Tensor:
    # What is not a number is refused, but maybe later (`refusals.py`): until then it must not lead out of the table.
    cells = (rows * trellis.cells).round().nan_to_num().clamp(-REACH, REACH).to(torch.int64).T + REACH
    around = cells.roll(trellis.overlap, dims=0)[: 2 * trellis.overlap]
    cost, before = _search(around, torch.zeros(len(rows), STATES, dtype=torch.int32, device=rows.device), trellis)
    seam = _trace(_first_least(cost), before[trellis.overlap :], trellis)[1]
    closed = torch.full_like(cost, MOST[trellis.ways]).scatter_(1, seam.unsqueeze(1), 0)
    _, before = _search(cells, closed, trellis)
    return _trace(seam, before, trellis)[0]


def _search(cells: Tensor, cost: Tensor, trellis: Trellis) -> tuple[Tensor, list[Tensor]]:
    """Viterbi's algorithm. Costs stay at MOST; of equally good ways the one with the lowest column is taken.

    Args:
        cells: ``[d, V]`` int64, which row of the search table a coordinate has.
        cost: ``[V, 256]`` int32 of the states before the first coordinate.
        trellis: the code.

    Returns:
        The costs of the states behind the last coordinate ``[V, 256]``, and for each coordinate the state from which
        each state was reached best, ``[V, 256]`` uint8.
    """
    sources, costs = (constant(table, cells.device) for table in _ways(trellis))
    tried, most, interval = trellis.ways, MOST[trellis.ways], INTERVAL[trellis.ways]
    order = torch.arange(tried, dtype=torch.int32, device=cells.device).view(1, -1, 1)
    before = []
    for t, row in enumerate(cells):
        source = sources[row]
        sums = cost.gather(1, source.flatten(1).to(torch.int64)).view_as(source) + costs[row]
        # The number of the way in the low bits: the least sum, the first of equals, brings it along.
        best = (sums * tried + order).amin(1)
        if tried == 2:  # in a byte: both sums too large for it are the second one
            best = best.clamp(max=2 * most + 1)
        before.append(source.gather(1, (best % tried).to(torch.int64).unsqueeze(1)).squeeze(1))
        reached = (best // tried).clamp(max=most)
        # Less by what the best path had cost a coordinate before, which no way has lowered.
        if t % interval == interval - 2:
            paid = cost.amin(1, keepdim=True)
        cost = reached - paid if t % interval == interval - 1 else reached
    return cost, before


@lru_cache(maxsize=4)
def _ways(trellis: Trellis) -> tuple[Tensor, Tensor]:
    """The search table by states: for each cell, way and state ``[C, W, 256]`` the state before, and the step's cost.

    The way to state ``s * G + g`` from group g is through the label row of symbol s, and a label's column is the place
    in the group, xor what the bits in the middle of the window make of it.
    """
    bits = trellis.code.bits
    state = torch.arange(STATES)
    groups = STATES >> bits
    group, symbol = state % groups, state // groups
    label = trellis.labels.to(torch.int64)[symbol << STATE_BITS | group << bits]
    row, mix = label >> bits, (label % (1 << bits)).to(torch.uint8)
    sources = (group << bits).to(torch.uint8) + (trellis.search.columns[:, :, row] ^ mix)
    return sources, trellis.search.costs[:, :, row].to(torch.int32)


def _first_least(cost: Tensor) -> Tensor:
    """The lowest state ``[V]`` int64 among those of the least cost."""
    state = torch.arange(STATES, dtype=cost.dtype, device=cost.device)
    return (cost * STATES + state).amin(1).to(torch.int64) % STATES


def _trace(state: Tensor, before: list[Tensor], trellis: Trellis) -> tuple[Tensor, Tensor]:
    """Goes the path back that ends in ``state [V]``: its symbols ``[V, d]`` int32, and the state it starts from."""
    found = []
    for reached_from in reversed(before):
        found.append((state >> STATE_BITS - trellis.code.bits).to(torch.int32))
        state = reached_from.gather(1, state.unsqueeze(1)).squeeze(1).to(torch.int64)
    return torch.stack(found[::-1], dim=1), state
