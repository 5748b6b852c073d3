"""Trellis codes in plain torch: windows of symbols, and the search for the best path. Part of the reference kernels.

Letters: ``b`` bits of a symbol, ``n`` = 2^b, ``G`` = 2^(8 - b), ``V`` vectors. A *state* is the newest 8 bits, the last
symbol in the highest. From state ``g * n + j`` the symbol ``s`` leads through window ``s * 256 + g * n + j`` to state
``s * G + g``: the n states of a *group* g lead to the same n states.

All costs are integers, so that every implementation finds the same path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.constants import constant
from fibkv.trellis import STATE_BITS, Trellis, TrellisCode

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
    points = (rows * trellis.steps).round().clamp(-trellis.reach, trellis.reach).to(torch.int32).T.contiguous()
    own = torch.arange(STATES, dtype=torch.int32, device=rows.device).unsqueeze(1) % (1 << trellis.code.bits)
    around = points.roll(trellis.overlap, dims=0)[: 2 * trellis.overlap]
    cost, choices = _search(around, own.repeat(1, len(rows)), trellis)
    seam = _trace(cost.argmin(0), choices[trellis.overlap :], trellis)[1]
    closed = (own + trellis.far_cost).repeat(1, len(rows))
    closed.scatter_(0, seam.unsqueeze(0), own[seam].T)
    _, choices = _search(points, closed, trellis)
    return _trace(seam, choices, trellis)[0].T


def _search(points: Tensor, cost: Tensor, trellis: Trellis) -> tuple[Tensor, list[Tensor]]:
    """Viterbi's algorithm.

    A cost has its own state's number j within the group in its low b bits, so that the cheapest of a group's states,
    the first of equals, brings along which one it is.

    Args:
        points: ``[d, V]`` int32, in steps of the grid.
        cost: ``[256, V]`` int32 of the states before the first point.
        trellis: the code.

    Returns:
        The costs of the states behind the last point ``[256, V]``, without their low bits, and for each point from
        which state of its group each state was reached best, ``[256, V]`` uint8.
    """
    n = 1 << trellis.code.bits
    labels = constant(trellis.labels, points.device, torch.int64)
    own = torch.arange(STATES, dtype=torch.int32, device=points.device).unsqueeze(1) % n
    choices, plain = [], cost - own
    for row in points:
        steps = _distances(row, trellis).index_select(0, labels).view(n, STATES // n, n, -1)
        best = (steps + cost.view(1, STATES // n, n, -1)).amin(2).flatten(0, 1)
        choice = best % n
        plain = best - choice
        plain = (plain - plain.amin(0)).clamp(max=trellis.far_cost)
        cost = plain + own
        choices.append(choice.to(torch.uint8))
    return plain, choices


def _distances(row: Tensor, trellis: Trellis) -> Tensor:
    """Squared distances ``[2^m, V]`` int32 of one coordinate ``[V]`` to all levels, rounded down to multiples of n.

    In units of 2^-(6 + 2b) of a coordinate's variance, and at most ``trellis.most``.
    """
    bits = trellis.code.bits
    away = (row - constant(trellis.levels, row.device).unsqueeze(1)).abs()
    scaled = (away.clamp(max=trellis.farthest) << bits - 1).to(torch.int64)
    return (scaled.square() >> 16).to(torch.int32) & -(1 << bits)


def _trace(state: Tensor, choices: list[Tensor], trellis: Trellis) -> tuple[Tensor, Tensor]:
    """Goes the path back that ends in ``state [V]``: its symbols ``[d, V]`` int32, and the state it starts from."""
    n = 1 << trellis.code.bits
    found = []
    for choice in reversed(choices):
        found.append((state // (STATES // n)).to(torch.int32))
        state = state % (STATES // n) * n + choice.gather(0, state.unsqueeze(0)).squeeze(0)
    return torch.stack(found[::-1]), state
