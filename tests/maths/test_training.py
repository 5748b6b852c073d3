"""T5 and T6: training reaches the converged distortions, the paper's budget does not, and blocks beat scalars."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fibkv import codebook
from fibkv.codebook_file import Codebook
from fibkv.errors import CodebookError, ContractError
from fibkv.lloyd import assign, refine
from fibkv.scalar import lloyd_max_scalar
from fibkv.spherical import initial_codewords, sample_blocks
from fibkv.training import build
from fibkv.training_settings import TrainingSettings, default_settings

CONVERGED = [  # k, N, D at d = 64 and 128
    (2, 4, 0.35838, 0.36078),
    (2, 8, 0.19738, 0.19924),
    (2, 32, 0.05553, 0.05627),
    (2, 128, 0.01482, 0.01508),
    (3, 8, 0.35177, 0.35402),
    (3, 64, 0.09914, 0.10039),
    (4, 4, 0.64430, 0.64562),
    (8, 4, 0.82174, 0.82248),
    (8, 16, 0.59929, 0.60098),
]
PAPER = [  # k, N, D at d = 128
    (2, 16, 0.1173),
    (2, 64, 0.0320),
    (2, 256, 0.00828),
    (4, 16, 0.3634),
    (4, 64, 0.1970),
]
SLOPE = {4: 1.443, 8: 1.594, 16: 1.701, 32: 1.800, 64: 1.873, 128: 1.930, 256: 1.962}
SLOPE_LIMIT = 1.984


def _blocks(dim: int, block_dim: int, count: int, seed: int) -> Tensor:
    blocks = sample_blocks(dim, block_dim, count, np.random.default_rng((seed, dim)))
    return torch.from_numpy(blocks * math.sqrt(dim)).float()


@lru_cache
def _trained(block_dim: int, size: int) -> Codebook:
    """A shipped codebook, or one as it is built on first use."""
    if (block_dim, size) in codebook.SHIPPED:
        return codebook.load(block_dim, size)
    return build(block_dim, size, default_settings(block_dim, size))


def _fresh_distortion(block_dim: int, size: int, dim: int) -> float:
    return assign(_blocks(dim, block_dim, 200_000, seed=101), _trained(block_dim, size).codewords).distortion


@pytest.mark.parametrize(("block_dim", "size", "at_64", "at_128"), CONVERGED)
def test_converged_distortion(block_dim: int, size: int, at_64: float, at_128: float) -> None:
    assert _fresh_distortion(block_dim, size, 64) == pytest.approx(at_64, rel=0.01)
    assert _fresh_distortion(block_dim, size, 128) == pytest.approx(at_128, rel=0.01)


def _paper_training(block_dim: int, size: int, seed: int) -> tuple[float, float]:
    """Training and true distortion by the paper's recipe: 30 N samples, 4 turned starts, 25 iterations."""
    samples = _blocks(128, block_dim, 30 * size, seed)
    random = np.random.default_rng(seed)
    start = initial_codewords(128, block_dim, size) * math.sqrt(128)
    restarts = [
        refine(
            samples,
            torch.from_numpy(start @ stats.ortho_group.rvs(block_dim, random_state=random)).float(),
            max_iterations=25,
            relative_tolerance=0,
            generator=torch.Generator().manual_seed(seed),
            on_iteration=lambda iteration, distortion: None,
        )
        for _ in range(4)
    ]
    best = min(restarts, key=lambda refined: refined.distortion)
    return best.distortion, assign(_blocks(128, block_dim, 200_000, seed=102), best.codewords).distortion


@pytest.mark.parametrize(("block_dim", "size", "expected"), PAPER)
def test_paper_settings_overfit(block_dim: int, size: int, expected: float) -> None:
    # One draw of 30 N samples scatters by several percent at N = 16.
    train, true = np.mean([_paper_training(block_dim, size, seed) for seed in range(max(1, 128 // size))], axis=0)
    assert true == pytest.approx(expected, rel=0.04)
    assert train < 0.93 * true
    assert _fresh_distortion(block_dim, size, 128) < 0.95 * true


@pytest.mark.parametrize(
    ("block_dim", "size"), [(2, 4), (2, 8), (2, 16), (3, 64), (4, 16), (4, 64), (8, 16), (2, 256), (4, 256)]
)
def test_training_improves_on_the_initial_codebook(block_dim: int, size: int) -> None:
    start = torch.from_numpy(initial_codewords(128, block_dim, size) * math.sqrt(128)).float()
    initial = assign(_blocks(128, block_dim, 200_000, seed=103), start).distortion
    assert _fresh_distortion(block_dim, size, 128) < initial


def test_longer_blocks_are_better_at_two_bits() -> None:
    by_block_dim = [_fresh_distortion(block_dim, 4**block_dim, 128) for block_dim in (4, 3, 2)]
    distortions = [*by_block_dim, lloyd_max_scalar(128, 4).distortion]
    assert distortions == sorted(distortions)
    assert distortions[0] < 0.84 * distortions[-1]


def test_planar_codes_climb_to_their_high_rate_constant() -> None:
    # At R bits D is C 4^-R, where 4^R = N for k = 2.
    measured = [_fresh_distortion(2, size, 128) * size for size in SLOPE]
    assert measured == pytest.approx(list(SLOPE.values()), rel=0.01)
    assert measured == sorted(measured)
    assert measured[-1] < SLOPE_LIMIT


def test_a_planar_code_of_four_words_is_no_better_than_one_bit_scalars() -> None:
    assert _fresh_distortion(2, 4, 64) == pytest.approx(lloyd_max_scalar(64, 2).distortion, rel=0.005)


def test_report_of_a_build() -> None:
    settings = TrainingSettings(samples_per_codeword=1000, restarts=2, holdout_samples=50_000, head_dim=96)
    seen: list[tuple[int, int, str]] = []
    book = build(2, 8, settings, seed=5, progress=lambda *step: seen.append(step))
    report = book.report
    assert (report.block_dim, report.size, report.seed, report.training) == (2, 8, 5, settings)
    assert report.training_samples == 8000
    assert report.restart in (0, 1)
    assert [measured.head_dim for measured in report.held_out] == [64, 96, 128]
    assert report.codebook_digest == book.digest
    assert report.held_out_at(128) == pytest.approx(0.19924, rel=0.02)
    assert report.gap == pytest.approx(1 - report.train_distortion / report.held_out_at(96))
    with pytest.raises(
        CodebookError, match=r"k=2, N=8: no held-out distortion at head_dim 32, only at \[64, 96, 128\]"
    ):
        report.held_out_at(32)
    done, totals, notes = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {3 * 201}
    assert notes[0].startswith("restart 1 of 2, D = ")
    assert notes[-1].startswith("refining the best, D = ")


def test_builds_repeat_and_seeds_differ() -> None:
    settings = TrainingSettings(
        samples_per_codeword=1000, restarts=1, max_iterations=5, holdout_samples=1000, head_dim=96
    )
    first, again, other = (build(2, 8, settings, seed=seed).digest for seed in (0, 0, 1))
    assert first == again != other


def test_bounds_of_a_build() -> None:
    with pytest.raises(ContractError, match=r"build\.block_dim: expected between 1 and head_dim 96 - 1, got 96"):
        build(96, 4, default_settings(2, 4))
    with pytest.raises(ContractError, match=r"build\.size: expected at least 2, got 1"):
        build(2, 1, default_settings(2, 4))


def test_default_budget() -> None:
    assert default_settings(2, 256).restarts == 4
    assert default_settings(2, 4).restarts == 64
    assert default_settings(4, 4096).restarts == 2
    assert default_settings(2, 4).samples_per_codeword >= 1000
    assert default_settings(256, 4).head_dim == 512
