"""How codebooks are trained: the settings, and which ones stand behind the codebook of each (k, N)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fibkv.contract import Contract, Count, Index

SHIPPED: tuple[tuple[int, int], ...] = (
    (1, 2),
    (1, 4),
    (1, 8),
    (1, 16),
    (2, 16),
    (2, 64),
    (2, 256),
    (4, 16),
    (4, 64),
    (4, 256),
    (8, 256),
    (16, 256),
)
"""The (block dim, size) of the codebooks that come with the package."""

SOURCE_DIM = 96
"""Dimension that codebooks are trained at by default. Scaled to other dimensions they lose little against books trained
there: below .1 % of the distortion from d = 64 to 256 at 4 bits, .8 % at d = 32. (At 128: .11 % at 64, 1 % at 32.)"""


class TrainingSettings(Contract):
    """How a codebook was refined (FibQuant, arXiv 2605.11478, appendix A), so that it can be rebuilt.

    The paper trains with 30 samples per codeword and keeps the restart that is best on those samples,
    which picks the most overfitted one. The defaults train until convergence and choose on samples held out.
    """

    samples_per_codeword: Count = 2000
    restarts: Count = 4
    max_iterations: Index = 200
    relative_tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    holdout_samples: Count = 200_000
    head_dim: Annotated[int, Field(ge=2, le=4096)]
    """Dimension of the unit vectors whose blocks were the training source."""


def training_settings(block_dim: int, size: int) -> TrainingSettings:
    """The settings behind the codebook that `fibkv.codebook.load` gives for (k, N) = (block_dim, size)."""
    return shipped_settings(size) if (block_dim, size) in SHIPPED else default_settings(block_dim, size)


def default_settings(block_dim: int, size: int) -> TrainingSettings:
    """The budget of a codebook that is built on first use: seconds at N = 16, a minute or so of one core at N = 256."""
    # An iteration then takes seconds. The thrift costs about half a percent of distortion (measured at k = 4, N = 256).
    large = size > 1024
    return TrainingSettings(
        samples_per_codeword=1000 if large else 2000,
        # Few codewords have few and very different optima, and restarts that cost next to nothing.
        restarts=2 if large else max(4, 256 // size),
        relative_tolerance=1e-5 if large else 1e-6,
        # A source needs d > k, and vectors of these blocks have at least 2k coordinates.
        head_dim=max(SOURCE_DIM, 2 * block_dim),
    )


def shipped_settings(size: int) -> TrainingSettings:
    """The budget of the package's codebooks: more restarts and samples than a first use has patience for."""
    return TrainingSettings(
        samples_per_codeword=max(4000, 2**20 // size),
        restarts=max(8, 512 // size),
        max_iterations=300,
        holdout_samples=2**20,
        head_dim=SOURCE_DIM,
    )
