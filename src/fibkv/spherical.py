"""The source of FibQuant: a block of k coordinates of a uniformly random unit vector of R^d. And its first codebook.

After a Haar rotation every fixed vector looks like this (arXiv 2605.11478, theorem 1). On the unit k-ball the density
is proportional to (1 - |x|^2)^((d-k-2)/2): the direction is uniform and independent of the radius, whose square is
Beta(k/2, (d-k)/2) with mean k/d.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from fibkv.directions import directions
from fibkv.errors import ContractError

Array = npt.NDArray[np.float64]


def sample_blocks(head_dim: int, block_dim: int, count: int, generator: np.random.Generator) -> Array:
    """Independent blocks ``[count, k]`` float64 of uniformly random unit vectors of R^d.

    Raises:
        ContractError: ``block_dim`` is not in 1..head_dim - 1.
    """
    _check(head_dim, block_dim)
    blocks = generator.standard_normal((count, block_dim))
    # The other d - k coordinates matter only through their squared length.
    rest = generator.chisquare(head_dim - block_dim, (count, 1))
    lengths: Array = np.sqrt((blocks * blocks).sum(1, keepdims=True) + rest)
    return blocks / lengths


def companded_beta(head_dim: int, block_dim: int) -> float:
    """beta_{d,k} = k/(k+2) (d-k-2)/2 + 1, the second parameter of the Beta law of squared codeword radii.

    The high-rate optimal point density is proportional to f^(k/(k+2)), which for this source is again of Beta type.
    """
    _check(head_dim, block_dim)
    return block_dim / (block_dim + 2) * (head_dim - block_dim - 2) / 2 + 1


def companded_radii(head_dim: int, block_dim: int, size: int) -> Array:
    """Radii ``[size]``, rising: r_n = sqrt(BetaInv((n - 1/2)/N; k/2, beta_{d,k})), n = 1..N (Eq. 5)."""
    squares: Array = special.betaincinv(block_dim / 2, companded_beta(head_dim, block_dim), _midpoints(size))
    return np.sqrt(squares)


def planar_radii(head_dim: int, size: int) -> Array:
    """Radii ``[size]`` for k = 2 in closed form: r_n = sqrt(1 - (1 - (n - 1/2)/N)^(4/d)) (Eq. 6)."""
    _check(head_dim, 2)
    return np.sqrt(-np.expm1(4 / head_dim * np.log1p(-_midpoints(size))))


def initial_codewords(head_dim: int, block_dim: int, size: int) -> Array:
    """The codebook ``[N, k]`` float64 before training, for blocks of unit vectors: codeword n is r_n times direction n.

    Raises:
        ContractError: ``block_dim`` is below 2 or not below ``head_dim``.
    """
    points = directions(block_dim, size)
    radii = planar_radii(head_dim, size) if block_dim == 2 else companded_radii(head_dim, block_dim, size)
    return radii[:, None] * points


def _midpoints(size: int) -> Array:
    return (np.arange(size) + 0.5) / size


def _check(head_dim: int, block_dim: int) -> None:
    if not 0 < block_dim < head_dim:
        raise ContractError("spherical.block_dim", f"between 1 and head_dim {head_dim} - 1", block_dim)
