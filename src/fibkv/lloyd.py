"""Lloyd-Max refinement of a codebook (generalized Lloyd, LBG) on samples: nearest assignment, then centroids.

Samples and codewords are float32 in units in which a coordinate has variance 1, so that the mean squared error per
coordinate is the distortion D = E||u - u_hat||^2 of a unit vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at a time by the codeword search: 2**19 float32 fit in a core's second-level cache.
_TILE_SCORES = 1 << 19
# Size of the perturbation by which a cell is split, relative to the root mean square error inside it.
_SPLIT_NOISE = 0.1


@dataclass(frozen=True, slots=True)
class Cells:
    """What the samples nearest to each codeword add up to.

    Attributes:
        counts: ``[N]`` float64, number of samples.
        sums: ``[N, k]`` float64, their sum.
        errors: ``[N]`` float64, their summed squared distance to the codeword.
    """

    counts: Tensor
    sums: Tensor
    errors: Tensor

    @property
    def distortion(self) -> float:
        """Mean squared error per coordinate over all samples."""
        return float(self.errors.sum() / self.counts.sum()) / self.sums.shape[1]


@dataclass(frozen=True, slots=True)
class Refined:
    """A refined codebook.

    Attributes:
        codewords: ``[N, k]`` float32.
        distortion: of these codewords on the samples that they were refined on.
        iterations: centroid updates made.
    """

    codewords: Tensor
    distortion: float
    iterations: int


def refine(
    samples: Tensor,
    start: Tensor,
    *,
    max_iterations: int,
    relative_tolerance: float,
    generator: torch.Generator,
    on_iteration: Callable[[int, float], None],
) -> Refined:
    """Lloyd iterations from a start until an iteration lowers the distortion by less than a tolerance.

    A codeword that no sample is nearest to splits the cell with the highest distortion (arXiv 2605.11478, appendix A).

    Args:
        samples: ``[M, k]`` float32.
        start: ``[N, k]`` float32.
        max_iterations: updates after which it stops in any case; 0 only measures the start.
        relative_tolerance: it stops when (old - new) <= tolerance * new and no cell is empty.
        generator: of the noise that splits cells.
        on_iteration: called with the number of updates made and the distortion after each assignment.
    """
    codewords, previous = start, float("inf")
    for iteration in range(max_iterations + 1):
        cells = assign(samples, codewords)
        distortion = cells.distortion
        on_iteration(iteration, distortion)
        settled = previous - distortion <= relative_tolerance * distortion and bool(cells.counts.all())
        if settled or iteration == max_iterations:
            break
        codewords, previous = _centroids(cells, generator), distortion
    return Refined(codewords, distortion, iteration)


def assign(samples: Tensor, codewords: Tensor) -> Cells:
    """Assigns every sample to its nearest codeword, in tiles of bounded memory.

    Args:
        samples: ``[M, k]`` float32.
        codewords: ``[N, k]`` float32.
    """
    size, block_dim = codewords.shape
    totals = torch.zeros(size, block_dim + 2, dtype=torch.float64)
    half_norms = codewords.square().sum(1) / 2
    for tile in samples.split(max(1, _TILE_SCORES // size)):
        # |x - c|^2 = |x|^2 - 2 (<x, c> - |c|^2 / 2): the nearest codeword has the highest score.
        score, nearest = torch.addmm(half_norms, tile, codewords.T, beta=-1).max(1)
        error = (tile.square().sum(1) - 2 * score).clamp(min=0)
        rows = torch.cat([tile, error[:, None], torch.ones_like(error)[:, None]], dim=1)
        totals.index_add_(0, nearest, rows.to(torch.float64))
    return Cells(counts=totals[:, -1], sums=totals[:, :-2], errors=totals[:, -2])


def _centroids(cells: Cells, generator: torch.Generator) -> Tensor:
    centroids = cells.sums / cells.counts.clamp(min=1)[:, None]
    empty = (cells.counts == 0).nonzero().squeeze(1)
    if len(empty):
        occupied = int((cells.counts > 0).sum())
        worst = cells.errors.argsort(descending=True)[:occupied]
        donors = worst[torch.arange(len(empty)) % occupied]
        spread = (cells.errors[donors] / cells.counts[donors]).sqrt()[:, None]
        noise = torch.randn(len(empty), centroids.shape[1], generator=generator, dtype=torch.float64)
        centroids[empty] = centroids[donors] + _SPLIT_NOISE * spread * noise
    return centroids.to(torch.float32)
