"""T1: the spherical-Beta source."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fibkv.errors import ContractError
from fibkv.spherical import sample_blocks
from tests.maths.measure import unit_vectors

VARIANCES = {
    64: {2: 9.1738e-4, 3: 1.35387e-3, 4: 1.77557e-3, 8: 3.31439e-3},
    128: {2: 2.36629e-4, 3: 3.52126e-4, 4: 4.65745e-4, 8: 9.01442e-4},
    256: {2: 6.00889e-5, 3: 8.97785e-5, 4: 1.19231e-4, 8: 2.34675e-4},
}
CASES = [(dim, block_dim) for dim, row in VARIANCES.items() for block_dim in row]


def _squared_radii(dim: int, block_dim: int, count: int) -> np.ndarray:
    return (sample_blocks(dim, block_dim, count, np.random.default_rng((dim, block_dim))) ** 2).sum(1)


@pytest.mark.parametrize(("dim", "block_dim"), CASES)
def test_moments_of_the_squared_radius(dim: int, block_dim: int) -> None:
    squares = _squared_radii(dim, block_dim, 1_000_000)
    variance = VARIANCES[dim][block_dim]
    # Five standard errors of the mean; the variance of a near-exponential law is known to about .3 % from 1e6 values.
    assert squares.mean() == pytest.approx(block_dim / dim, abs=5 * (variance / 1e6) ** 0.5)
    assert squares.var() == pytest.approx(variance, rel=0.015)


@pytest.mark.parametrize(("dim", "block_dim"), CASES)
def test_squared_radius_is_beta(dim: int, block_dim: int) -> None:
    law = stats.beta(block_dim / 2, (dim - block_dim) / 2)
    assert stats.kstest(_squared_radii(dim, block_dim, 100_000), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("block_dim", [2, 8])
def test_blocks_are_those_of_unit_vectors(block_dim: int) -> None:
    sampled = _squared_radii(64, block_dim, 50_000)
    cut = unit_vectors(64, 50_000, seed=1)[:, :block_dim].square().sum(1).numpy()
    assert stats.ks_2samp(sampled, cut).pvalue > 1e-3


def test_directions_are_uniform() -> None:
    blocks = sample_blocks(128, 3, 200_000, np.random.default_rng(5))
    heights = blocks[:, 2] / np.linalg.norm(blocks, axis=1)
    # Archimedes: the height of a uniform point of the sphere is uniform.
    assert stats.kstest(heights, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_block_must_be_smaller_than_the_vector() -> None:
    with pytest.raises(ContractError, match=r"block_dim: expected between 1 and head_dim 8 - 1, got 8"):
        sample_blocks(8, 8, 1, np.random.default_rng(0))
