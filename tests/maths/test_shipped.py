"""The codebooks of the package on unit vectors that no training has seen: distortion, gain, cosine, digests."""

from __future__ import annotations

import pytest
import torch

from fibkv import codebook
from fibkv.training import build, shipped_settings
from fibkv.training_settings import TrainingSettings
from tests.maths.measure import distortion, quantize, unit_vectors, with_gain

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
DIGESTS = {
    (1, 2): "blake3:27628d0443a5ecfa804628aa9eee8e801fe936f83f0af75b8b182cffcd2ca700",
    (1, 4): "blake3:66fea09be463c0083b1965c0cb7642f4d331ae81e603f367cd4a9599d6ac0817",
    (1, 8): "blake3:e662f0a93f6dd978a51f4f35bcbcfa6c63d6c9c8eceee396f036137797d6e538",
    (1, 16): "blake3:57e9204845b0d47bc11fb188a592aa36c92da79ebd6cdfacf9814a4064b378c7",
    (2, 16): "blake3:66dc8b85721506303f5a3b3631d308ef4e38b4188ae80e176625ad85a72cb35e",
    (2, 64): "blake3:86a6bcf34c677575fc05ac18e05a43ca3b875f07632f1a9e322b12abab7f8097",
    (2, 256): "blake3:7dd96e3281d371d461254107cfcf71295493990ac67e5c947729551b8065f50a",
    (4, 16): "blake3:c6b9425ca5f16ed5c714c41d25a27f685c8af84550b21d2413cb96651969bb41",
    (4, 64): "blake3:76d9936b661d0b46e21f2612fdf6daa46858ca29e37385961415cb4ccbf3cfcf",
    (4, 256): "blake3:b2fe15a8b6e5c95cd26c9712454866ca542b2c2aa0da87702b1a0da0dd1b4bd4",
    (8, 256): "blake3:186e00260ca30f13960fade73dac9b397dfb312216bba72c1ebd7ceac1743f18",
    (16, 256): "blake3:1135a3d50c799f0be392e3aaa61d2ed84511a445bba131b969b6d9aa3a3c6cbe",
}


def _blocks_of(dim: int, block_dim: int) -> torch.Tensor:
    """Unit vectors that make 2.5e5 blocks, and at least 4000 of them."""
    return unit_vectors(dim, max(4000, 250_000 * block_dim // dim), seed=1000 + block_dim)


@pytest.mark.parametrize(("block_dim", "size"), BOUNDS)
def test_distortion_at_128(block_dim: int, size: int) -> None:
    vectors = _blocks_of(128, block_dim)
    quantized = quantize(vectors, codebook.load(block_dim, size).codewords)
    plain = distortion(vectors, quantized)
    assert plain <= BOUNDS[block_dim, size]
    assert distortion(vectors, with_gain(vectors, quantized)) < plain


@pytest.mark.parametrize(("block_dim", "size"), TABLE)
@pytest.mark.parametrize("dim", [64, 128])
def test_distortion_of_the_table(block_dim: int, size: int, dim: int) -> None:
    vectors = _blocks_of(dim, block_dim)
    expected = TABLE[block_dim, size][dim // 128]
    measured = distortion(vectors, quantize(vectors, codebook.load(block_dim, size).codewords))
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dim", [64, 128])
def test_better_optimum_than_the_table(dim: int) -> None:
    vectors = _blocks_of(dim, 4)
    measured = distortion(vectors, quantize(vectors, codebook.load(4, 16).codewords))
    assert 0.98 * LOOSE_TABLE[4, 16][dim // 128] < measured < 0.995 * LOOSE_TABLE[4, 16][dim // 128]


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_report_is_true(block_dim: int, size: int) -> None:
    book = codebook.load(block_dim, size)
    assert abs(book.report.gap) < 0.02
    for dim in (64, 128):
        vectors = _blocks_of(dim, block_dim)
        assert book.report.held_out_at(dim) == pytest.approx(
            distortion(vectors, quantize(vectors, book.codewords)), rel=0.01
        )
    assert book.report.training == shipped_settings(size)
    assert book.report.training_samples >= (1000 * size if block_dim > 1 else 0)


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_codewords_are_centroids(block_dim: int, size: int) -> None:
    """E<u, u_hat> = E|u_hat|^2 = 1 - D."""
    vectors = _blocks_of(96, block_dim)
    quantized = quantize(vectors, codebook.load(block_dim, size).codewords)
    inner = float((vectors * quantized).sum(1).mean())
    square = float(quantized.square().sum(1).mean())
    # What overfitting is left shows here: at k = 16 the words are half a percent too long.
    tolerance = 0.015 if block_dim == 16 else 0.005
    assert inner == pytest.approx(square, rel=tolerance)
    assert 1 - distortion(vectors, quantized) == pytest.approx(square, rel=tolerance)


@pytest.mark.parametrize(("block_dim", "size"), COSINES)
def test_cosine(block_dim: int, size: int) -> None:
    """T7: Atlas's row at d = 256 is a floor, sqrt(1 - D) the target."""
    vectors = _blocks_of(256, block_dim)
    quantized = quantize(vectors, codebook.load(block_dim, size).codewords)
    cosine = float(torch.cosine_similarity(vectors, quantized).mean())
    assert cosine >= COSINES[block_dim, size]
    assert cosine == pytest.approx((1 - distortion(vectors, quantized)) ** 0.5, abs=0.001)


def test_cosine_at_two_and_a_half_bits() -> None:
    settings = TrainingSettings(
        samples_per_codeword=100, restarts=1, max_iterations=15, holdout_samples=1000, head_dim=96
    )
    vectors = unit_vectors(256, 1500, seed=2)
    quantized = quantize(vectors, build(4, 1024, settings).codewords)
    assert float(torch.cosine_similarity(vectors, quantized).mean()) >= 0.973


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_digests_never_change(block_dim: int, size: int) -> None:
    """Pages are bound to these: another digest makes every page that was ever written unreadable."""
    assert codebook.load(block_dim, size).digest == DIGESTS[block_dim, size]
