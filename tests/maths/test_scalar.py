"""T3, T4 and T9: the scalar code, alone and as TurboQuant end to end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fibkv import codebook
from fibkv.errors import CodebookError
from fibkv.scalar import lloyd_max_scalar
from tests.maths.measure import distortion, quantize, unit_vectors

# So large a dimension is the Gaussian to six digits.
GAUSSIAN = 1_000_000
DISTORTIONS = {  # d: D at 1, 2, ... bits
    64: (0.358387, 0.114526, 0.033391, 0.009132, 0.002399),
    80: (0.359389, 0.115115, 0.033620, 0.009204),
    96: (0.360056, 0.115508, 0.033773, 0.009253),
    128: (0.360889, 0.116000, 0.033966, 0.009315, 0.002451),
    256: (0.362136, 0.116740, 0.034256, 0.009408),
    GAUSSIAN: (0.363380, 0.117482, 0.034548, 0.009501, 0.002505),
}
POSITIVE_LEVELS = {
    64: (
        (0.80101,),
        (0.45212, 1.49997),
        (0.24375, 0.75066, 1.32934, 2.11131),
        (0.12735, 0.38472, 0.65049, 0.93189, 1.23940, 1.59085, 2.02331, 2.64637),
    ),
    128: (
        (0.79944,),
        (0.45245, 1.50519),
        (0.24442, 0.75333, 1.33660, 2.13147),
        (0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886),
    ),
    GAUSSIAN: (
        (0.79788,),
        (0.45278, 1.51042),
        (0.24509, 0.75601, 1.34391, 2.15195),
        (0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
    ),
}


@pytest.mark.parametrize(
    ("dim", "bits"), [(dim, bits + 1) for dim, row in DISTORTIONS.items() for bits in range(len(row))]
)
def test_distortion(dim: int, bits: int) -> None:
    # The tables give six decimals.
    assert lloyd_max_scalar(dim, 2**bits).distortion == pytest.approx(DISTORTIONS[dim][bits - 1], rel=1e-4, abs=6e-7)


@pytest.mark.parametrize("dim", POSITIVE_LEVELS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels(dim: int, bits: int) -> None:
    levels = lloyd_max_scalar(dim, 2**bits).levels
    assert levels[2 ** (bits - 1) :] == pytest.approx(POSITIVE_LEVELS[dim][bits - 1], abs=1e-4)
    assert (levels == -levels[::-1]).all()


@pytest.mark.parametrize("size", [2, 3, 16, 256, 4096])
def test_levels_are_centroids_by_quadrature(size: int) -> None:
    dim = 64
    code = lloyd_max_scalar(dim, size)
    fine = np.linspace(-1, 1, 2_000_001)[1:-1]
    weights = (1 - fine**2) ** ((dim - 3) / 2)
    levels = code.levels / math.sqrt(dim)
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, fine)
    centroids = np.bincount(cell, weights * fine) / np.bincount(cell, weights)
    # The grid resolves a cell to about 1/80 at 4096 levels.
    assert centroids == pytest.approx(levels, abs=2e-6)
    assert dim * (weights * (fine - levels[cell]) ** 2).sum() / weights.sum() == pytest.approx(
        code.distortion, rel=1e-3
    )


def test_dimension_three_is_the_uniform_law() -> None:
    code = lloyd_max_scalar(3, 4)
    assert code.levels / math.sqrt(3) == pytest.approx([-0.75, -0.25, 0.25, 0.75], abs=1e-12)
    assert code.distortion == pytest.approx(1 / 16, rel=1e-12)


def test_dimension_two_is_refused() -> None:
    with pytest.raises(CodebookError, match="expected head_dim of at least 3, got 2"):
        lloyd_max_scalar(2, 4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_on_unit_vectors(bits: int) -> None:
    vectors = unit_vectors(128, 4000, seed=bits)
    decoded = quantize(vectors, codebook.load(1, 2**bits).codewords)
    assert distortion(vectors, decoded) == pytest.approx(DISTORTIONS[128][bits - 1], rel=0.01)


def test_one_bit_slope() -> None:
    # A centroid code shrinks inner products by 1 - D.
    vectors = unit_vectors(128, 4000, seed=11)
    decoded = quantize(vectors, codebook.load(1, 2).codewords)
    assert float((vectors * decoded).sum(1).mean()) == pytest.approx(0.639, abs=0.001)


@pytest.mark.parametrize(("bits", "variance"), [(1, 0.012272), (2, 0.004429), (3, 0.001424), (4, 0.000417)])
def test_inner_product_code(bits: int, variance: float) -> None:
    """TurboQuant's unbiased variant: a (b - 1)-bit code and a 1-bit Gaussian sketch (QJL) of what it leaves."""
    dim, sketches = 128, 25
    errors = []
    for seed in range(sketches):
        keys, queries = unit_vectors(dim, 4000, seed=2 * seed), unit_vectors(dim, 4000, seed=2 * seed + 1)
        coded = torch.zeros_like(keys) if bits == 1 else quantize(keys, codebook.load(1, 2 ** (bits - 1)).codewords)
        rest = keys - coded
        sketch = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        signs = (rest @ sketch.T).sign()
        scale = math.sqrt(math.pi / 2) / dim * rest.norm(dim=1)
        estimate = (queries * coded).sum(1) + scale * ((queries @ sketch.T) * signs).sum(1)
        errors.append(estimate - (queries * keys).sum(1))
    error = torch.cat(errors)
    # 1e5 errors, in groups that share a sketch; the exact variance is lower by 1 - 2/(pi d), half a percent.
    assert float(error.var()) == pytest.approx(variance * (1 - 2 / (math.pi * dim)), rel=0.02)
    assert abs(float(error.mean())) < 5 * math.sqrt(variance / len(error))


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1161), (4, 0.0094)])
def test_gaussian_keys(bits: int, expected: float) -> None:
    """OCTOPUS's synthetic check, with vectors of N(0, 1) coordinates that keep their norms."""
    keys = torch.randn(4000, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norms = keys.norm(dim=1, keepdim=True)
    decoded = quantize(keys / norms, codebook.load(1, 2**bits).codewords) * norms.half().double()
    # The expected figures are rounded to four decimals.
    assert distortion(keys, decoded) == pytest.approx(expected, rel=0.005, abs=1e-4)
