"""Lists of candidates: every point's nearest codeword is in its cell's list, at every factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibkv.codecs import codec_for
from fibkv.codecs.fib import SCALES
from fibkv.kernels.candidates import MOST, Candidates, candidates
from fibkv.kernels.nearest import nearest
from fibkv.parameters import FibParameters


def book(size: int) -> Tensor:
    tables = codec_for(FibParameters.of(64, 2, size)).tables
    return tables.codewords


def listed(cells: Candidates, points: Tensor) -> tuple[Tensor, Tensor]:
    """The points' lists ``[n]``, and their entries, ``[n, MOST]``."""
    places = ((points + cells.extent) * (cells.side / (2 * cells.extent))).int().clamp(0, cells.side - 1)
    found = cells.lists[places[:, 0] * cells.side + places[:, 1]]
    return found, (found[:, None] >> (8 * torch.arange(MOST))) & 0xFF


@pytest.mark.parametrize("scales", [(1.0,), SCALES], ids=["one", "five"])
@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_nearest_codeword_is_a_candidate(size: int, scales: tuple[float, ...]) -> None:
    codewords = book(size)
    cells = candidates(codewords, scales)
    assert cells.width <= 4
    assert cells.starts[-1] + cells.width <= 6
    generator = torch.Generator().manual_seed(size)
    inner = torch.randn(20_000, 2, generator=generator) / 8
    # Also where unit vectors seldom are, and on the borders of cells.
    outer = torch.rand(20_000, 2, generator=generator) * 2 - 1
    borders = (torch.randint(0, cells.side + 1, (20_000, 2), generator=generator) / cells.side * 2 - 1) * cells.extent
    points = torch.cat([inner, outer, borders.clamp(-1, 1)])
    lists, entries = listed(cells, points)
    whole_book = lists < 0
    assert float(whole_book[: len(inner)].double().mean()) < 1e-3
    for scale, start in zip(scales, cells.starts, strict=True):
        found = nearest(points * scale, codewords)
        window = entries[:, start : start + cells.width]
        assert bool((whole_book | (window == found[:, None]).any(1)).all())


def test_lists_that_are_too_long_stand_for_the_whole_book() -> None:
    # A ring, and nothing in its middle: any codeword may be nearest to a point there.
    angles = torch.arange(64) * (2 * torch.pi / 64)
    ring = torch.stack([angles.cos(), angles.sin()], 1) * 0.2
    cells = candidates(ring, (1.0,))
    assert listed(cells, torch.zeros(1, 2))[0] < 0
    assert listed(cells, torch.tensor([[0.3, 0.0]]))[0] >= 0
