"""The codebooks of the package on unit vectors that no training has seen: distortion, gain, cosine, digests."""

from __future__ import annotations

import pytest
import torch

from fibkv import codebook
from fibkv.parameters import TrainingSettings
from fibkv.training import build
from tests.maths.measure import distortion, quantise, unit_vectors, with_gain

BOUNDS = {  # at d = 128, float16 norm, no gain
    (1, 4): 0.1162,
    (2, 16): 0.1068,
    (2, 64): 0.0296,
    (2, 256): 0.00772,
    (4, 256): 0.0962,
    (8, 256): 0.322,
    (16, 256): 0.581,
}
TABLE = {  # D at d = 64 and 128 as measured for the project; None where it was not
    (1, 2): (0.358387, 0.360889),
    (1, 4): (0.114526, 0.116000),
    (1, 8): (0.033391, 0.033966),
    (1, 16): (0.009132, 0.009315),
    (2, 16): (0.10500, 0.10630),
    (2, 64): (0.02880, 0.02927),
    (2, 256): (0.00754, 0.00766),
    (4, 64): (0.18033, 0.18228),
    (4, 256): (0.09468, 0.09576),
    (8, 256): (0.31733, 0.31989),
}
# Here the table stands on a local optimum 1.2 % above the one found with more restarts.
LOOSE_TABLE = {(4, 16): (0.34098, 0.34332)}
COSINES = {(2, 16): 0.939, (2, 64): 0.984, (2, 256): 0.996, (4, 256): 0.948}
DIGESTS: dict[tuple[int, int], str] = {}


def _blocks_of(dim: int, block_dim: int) -> torch.Tensor:
    """Unit vectors that make 2.5e5 blocks, and at least 4000 of them."""
    return unit_vectors(dim, max(4000, 250_000 * block_dim // dim), seed=1000 + block_dim)


@pytest.mark.parametrize(("block_dim", "size"), BOUNDS)
def test_distortion_at_128(block_dim: int, size: int) -> None:
    vectors = _blocks_of(128, block_dim)
    quantised = quantise(vectors, codebook.load(block_dim, size).codewords)
    plain = distortion(vectors, quantised)
    assert plain <= BOUNDS[block_dim, size]
    assert distortion(vectors, with_gain(vectors, quantised)) < plain


@pytest.mark.parametrize(("block_dim", "size"), TABLE)
@pytest.mark.parametrize("dim", [64, 128])
def test_distortion_of_the_table(block_dim: int, size: int, dim: int) -> None:
    vectors = _blocks_of(dim, block_dim)
    expected = TABLE[block_dim, size][dim // 128]
    measured = distortion(vectors, quantise(vectors, codebook.load(block_dim, size).codewords))
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dim", [64, 128])
def test_better_optimum_than_the_table(dim: int) -> None:
    vectors = _blocks_of(dim, 4)
    measured = distortion(vectors, quantise(vectors, codebook.load(4, 16).codewords))
    assert 0.98 * LOOSE_TABLE[4, 16][dim // 128] < measured < 0.995 * LOOSE_TABLE[4, 16][dim // 128]


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_report_is_true(block_dim: int, size: int) -> None:
    book = codebook.load(block_dim, size)
    assert abs(book.report.gap) < 0.02
    for dim in (64, 128):
        vectors = _blocks_of(dim, block_dim)
        assert book.report.held_out_at(dim) == pytest.approx(distortion(vectors, quantise(vectors, book.codewords)), rel=0.01)
    assert book.report.training_samples >= (1000 * size if block_dim > 1 else 0)


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_codewords_are_centroids(block_dim: int, size: int) -> None:
    """E<u, u_hat> = E|u_hat|^2 = 1 - D."""
    vectors = _blocks_of(96, block_dim)
    quantised = quantise(vectors, codebook.load(block_dim, size).codewords)
    inner = float((vectors * quantised).sum(1).mean())
    square = float(quantised.square().sum(1).mean())
    assert inner == pytest.approx(square, rel=0.005)
    assert 1 - distortion(vectors, quantised) == pytest.approx(square, rel=0.005)


@pytest.mark.parametrize(("block_dim", "size"), COSINES)
def test_cosine(block_dim: int, size: int) -> None:
    """T7: Atlas's row at d = 256 is a floor, sqrt(1 - D) the target."""
    vectors = _blocks_of(256, block_dim)
    quantised = quantise(vectors, codebook.load(block_dim, size).codewords)
    cosine = float(torch.cosine_similarity(vectors, quantised).mean())
    assert cosine >= COSINES[block_dim, size]
    assert cosine == pytest.approx((1 - distortion(vectors, quantised)) ** 0.5, abs=0.001)


def test_cosine_at_two_and_a_half_bits() -> None:
    settings = TrainingSettings(samples_per_codeword=100, restarts=1, max_iterations=15, holdout_samples=1000, head_dim=96)
    vectors = unit_vectors(256, 1500, seed=2)
    quantised = quantise(vectors, build(4, 1024, settings).codewords)
    assert float(torch.cosine_similarity(vectors, quantised).mean()) >= 0.973


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_digests_never_change(block_dim: int, size: int) -> None:
    """Pages are bound to these: another digest makes every page that was ever written unreadable."""
    assert codebook.load(block_dim, size).digest == DIGESTS[block_dim, size]
