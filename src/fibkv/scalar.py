"""The scalar code, k = 1 (TurboQuant, arXiv 2504.19874): Lloyd-Max without samples, since every integral is closed.

A coordinate x of a uniformly random unit vector of R^d has density f(x) proportional to (1 - x^2)^((d-3)/2) on
[-1, 1]: (1 + x)/2 is Beta((d-1)/2, (d-1)/2). It is log-concave from d = 3 on, which makes the optimal code unique.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg, special

from fibkv.errors import CodebookError

Array = npt.NDArray[np.float64]

_MAX_ITERATIONS = 100
# It has converged when no level moved by more than this part of the smallest distance between levels. Convergence is
# quadratic: the levels are then right to a millionth of it, or to rounding where that is coarser.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ScalarCode:
    """An optimal scalar code.

    Attributes:
        levels: ``[N]`` float64, rising, symmetric about 0, in units in which a coordinate has variance 1.
        distortion: D = E||u - u_hat||^2 of unit vectors.
        iterations: Newton steps made.
    """

    levels: Array
    distortion: float
    iterations: int


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells between the midpoints of the levels: all ``[N]`` float64, edges ``[N + 1]``."""

    edges: Array
    masses: Array
    centroids: Array


def lloyd_max_scalar(head_dim: int, size: int) -> ScalarCode:
    """The optimal scalar code of ``size`` levels for coordinates of unit vectors of R^d.

    Solves "each level is the centroid of its cell" by Newton's method: the plain fixed-point iteration needs about
    N^2 steps. A level's centroid depends on its two neighbours only, so that a step is one tridiagonal solve.

    Args:
        head_dim: d, at least 3. For d to infinity this becomes the Gaussian's Lloyd-Max code.
        size: N, at least 2.

    Raises:
        CodebookError: ``head_dim`` is below 3, or the iteration did not converge.
    """
    if head_dim < 3:
        raise CodebookError(f"scalar code: expected head_dim of at least 3, got {head_dim}")
    # The high-rate optimal point density, f^(1/3), is again of Beta type.
    shape = (head_dim - 3) / 6 + 1
    levels = 2 * special.betaincinv(shape, shape, (np.arange(size) + 0.5) / size) - 1
    for iteration in range(1, _MAX_ITERATIONS + 1):
        cells = _cells(head_dim, levels)
        step = linalg.solve_banded((1, 1), _jacobian(head_dim, cells), levels - cells.centroids)
        # Symmetry holds only up to rounding, unless it is imposed.
        levels = levels - step
        levels = (levels - levels[::-1]) / 2
        if np.abs(step).max() < _TOLERANCE * np.diff(levels).min():
            cells = _cells(head_dim, levels)
            # E(x - c)^2 summed over d coordinates, of which E x^2 = 1/d each.
            distortion = 1 + head_dim * float((cells.masses * levels * (levels - 2 * cells.centroids)).sum())
            return ScalarCode(levels * math.sqrt(head_dim), distortion, iteration)
    raise CodebookError(
        f"scalar code of {size} levels at d = {head_dim}: no convergence in {_MAX_ITERATIONS} Newton steps, "
        f"the last one was {np.abs(step).max():.1e}"
    )


def _cells(head_dim: int, levels: Array) -> _Cells:
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    shape = (head_dim - 1) / 2
    # Each mass from the tail on its own side, where nothing cancels.
    below = special.betainc(shape, shape, (1 + edges) / 2)
    above = special.betainc(shape, shape, (1 - edges) / 2)
    masses = np.where(edges[1:] <= 0, np.diff(below), -np.diff(above))
    # The integral of x f(x) is -f(x) (1 - x^2) / (d - 1).
    moments = -np.diff(_density(head_dim, edges) * (1 - edges**2)) / (head_dim - 1)
    return _Cells(edges, masses, moments / masses)


def _jacobian(head_dim: int, cells: _Cells) -> Array:
    """The derivative of ``levels - centroids(levels)`` in `scipy.linalg.solve_banded`'s form, ``[3, N]``."""
    # An edge moves half as far as a level beside it, and takes mass f(edge) at its distance from the centroid.
    density = _density(head_dim, cells.edges) / 2
    lower = density[:-1] * (cells.centroids - cells.edges[:-1]) / cells.masses
    upper = density[1:] * (cells.edges[1:] - cells.centroids) / cells.masses
    # The outermost edges are the ends of the interval and do not move.
    lower[0] = upper[-1] = 0
    return np.stack([np.roll(-upper, 1), 1 - lower - upper, np.roll(-lower, -1)])


def _density(head_dim: int, x: Array) -> Array:
    log_scale = math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2) - math.log(math.pi) / 2
    density: Array = np.exp(log_scale) * (1 - x * x) ** ((head_dim - 3) / 2)
    return density
