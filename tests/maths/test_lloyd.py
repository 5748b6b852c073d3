"""The Lloyd-Max iteration itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.lloyd import Refined, assign, refine


def _gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _refine(samples: Tensor, start: Tensor, *, max_iterations: int, seen: list[tuple[int, float]]) -> Refined:
    return refine(
        samples,
        start,
        max_iterations=max_iterations,
        relative_tolerance=1e-7,
        generator=torch.Generator().manual_seed(0),
        on_iteration=lambda iteration, distortion: seen.append((iteration, distortion)),
    )


def test_cells_by_hand() -> None:
    cells = assign(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([[0.0], [5.0], [9.0]]))
    assert cells.counts.tolist() == [2, 2, 0]
    assert cells.sums.tolist() == [[1], [9], [0]]
    assert cells.errors.tolist() == [1, 1, 0]
    assert cells.distortion == 0.5


def test_assignment_does_not_depend_on_tiles() -> None:
    samples, codewords = _gaussian(50_000, 3), _gaussian(40, 3)
    distances = torch.cdist(samples.double(), codewords.double()).square().min(1).values
    assert abs(assign(samples, codewords).distortion - float(distances.mean()) / 3) < 1e-6


def test_every_iteration_lowers_the_distortion_until_it_settles() -> None:
    seen: list[tuple[int, float]] = []
    refined = _refine(_gaussian(5000, 2), _gaussian(8, 2), max_iterations=500, seen=seen)
    distortions = [distortion for _, distortion in seen]
    assert distortions == sorted(distortions, reverse=True)
    assert [iteration for iteration, _ in seen] == list(range(refined.iterations + 1))
    assert 5 < refined.iterations < 500
    assert refined.distortion == distortions[-1] == assign(_gaussian(5000, 2), refined.codewords).distortion


def test_settled_codewords_are_centroids() -> None:
    samples = _gaussian(5000, 2)
    cells = assign(samples, _refine(samples, _gaussian(8, 2), max_iterations=500, seen=[]).codewords)
    again = _refine(samples, (cells.sums / cells.counts[:, None]).float(), max_iterations=0, seen=[])
    assert abs(again.distortion / cells.distortion - 1) < 1e-6


def test_no_iterations_only_measure_the_start() -> None:
    start = _gaussian(8, 2)
    refined = _refine(_gaussian(5000, 2), start, max_iterations=0, seen=[])
    assert refined.iterations == 0
    assert torch.equal(refined.codewords, start)


def test_empty_cells_split_the_worst_one() -> None:
    # Two tight clusters, all codewords at one of them: the other cluster is the worst cell.
    clusters = torch.cat([_gaussian(1000, 2) * 0.1, _gaussian(1000, 2) * 0.1 + 100])
    refined = _refine(clusters, torch.tensor([[0.0, 0.0], [100.0, 100.0], [500.0, 500.0]]), max_iterations=1, seen=[])
    assert refined.codewords[2].sub(refined.codewords[:2]).norm(dim=1).min() < 1
    assert assign(clusters, refined.codewords).counts.min() > 0


def test_more_empty_cells_than_occupied_ones() -> None:
    samples = _gaussian(2000, 2)
    start = torch.cat([torch.zeros(1, 2), torch.full((15, 2), 1000.0)])
    refined = _refine(samples, start, max_iterations=200, seen=[])
    assert assign(samples, refined.codewords).counts.min() > 0
    assert refined.distortion < 0.13
