"""Directions: low-discrepancy points on the unit sphere of R^k, one per codeword of the initial codebook.

FibQuant (arXiv 2605.11478) takes the golden angle for k = 2, the Fibonacci sphere for k = 3 and Roberts' Kronecker
sequence, mapped by the inverse normal CDF, for k >= 4.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from fibkv.errors import ContractError

Array = npt.NDArray[np.float64]

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def directions(block_dim: int, size: int) -> Array:
    """Unit vectors ``[size, block_dim]`` float64, evenly spread; any run of neighbours is spread as well.

    Raises:
        ContractError: ``block_dim`` is below 2 (a scalar code is found exactly and needs no directions).
    """
    match block_dim:
        case 2:
            return golden_angle(size)
        case 3:
            return fibonacci_sphere(size)
        case _ if block_dim > 3:
            return roberts_kronecker(block_dim, size)
    raise ContractError("directions.block_dim", "at least 2", block_dim)


def golden_angle(size: int) -> Array:
    """Points ``[size, 2]`` of the circle, each a golden angle further: theta_n = 2 pi n (1 - 1/phi), n = 1..N."""
    angles = _golden_angles(size)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def fibonacci_sphere(size: int) -> Array:
    """Points ``[size, 3]`` of the Fibonacci sphere, their heights z_n = 1 - (2n - 1)/N taken in a permuted order.

    In the natural order radius and height would both be monotone in n, and all small codewords would sit at one pole:
    at d = 128, N = 64 the initial distortion is then twice that of k = 2 (.250; permuted .120). The permutation steps
    through the heights by about N/rho^2, rho = phi_2 the plastic number. A step of N/phi would tie the radius to the
    azimuth, which already turns by the golden angle.
    """
    order = (np.arange(size) * _coprime_stride(size)) % size
    heights = 1 - (2 * order + 1) / size
    # The azimuth belongs to the height, or the points would not be the Fibonacci sphere's.
    angles = _golden_angles(size)[order]
    equatorial = np.sqrt(1 - heights**2)
    return np.stack([equatorial * np.cos(angles), equatorial * np.sin(angles), heights], axis=1)


def roberts_kronecker(block_dim: int, size: int) -> Array:
    """Points ``[size, k]``: xi_nj = frac((n + 1/2) phi_k^-j), n from 0, through the inverse normal CDF, normalized."""
    powers = roberts_root(block_dim) ** -np.arange(1.0, block_dim + 1)
    uniforms = np.modf((np.arange(size)[:, None] + 0.5) * powers)[0]
    gaussians: Array = special.ndtri(uniforms)
    points: Array = gaussians / np.linalg.norm(gaussians, axis=1, keepdims=True)
    return points


def roberts_root(block_dim: int) -> float:
    """phi_k, the root above 1 of x^(k+1) = x + 1; phi_1 is the golden ratio."""
    root: float = optimize.brentq(lambda x: x ** (block_dim + 1) - x - 1, 1.0, 2.0, xtol=1e-15)
    return root


def _golden_angles(size: int) -> Array:
    return 2 * math.pi * (1 - 1 / GOLDEN_RATIO) * np.arange(1.0, size + 1)


def _coprime_stride(size: int) -> int:
    """The number nearest to size/rho^2, from below, that shares no factor with ``size``."""
    stride = max(1, round(size / roberts_root(2) ** 2))
    while math.gcd(stride, size) != 1:
        stride -= 1
    return stride
