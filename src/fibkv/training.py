"""Training of codebooks: multi-restart Lloyd-Max on the synthetic source, chosen and reported on held-out samples.

The paper's budget, 30 samples per codeword, 25 iterations and the restart that is best on its own training samples,
ends 8 % above the optimum at k = 2, N = 256, worse than the untrained codebook, and at N = 16 looks 18 % better than it
is. Centroids of M/N samples alone make the training distortion lower and the true one higher by about N/M each, and
among restarts the training distortion picks the most overfitted one. Hence: at least 1000 samples per codeword,
restarts compared on samples that none was trained on, and iterations until convergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fibkv.codebook_file import Codebook, CodebookReport, HeldOut, codebook_digest, file_name, write
from fibkv.errors import ContractError
from fibkv.lloyd import Refined, assign, refine
from fibkv.progress import Progress, silent
from fibkv.scalar import lloyd_max_scalar
from fibkv.spherical import initial_codewords, sample_blocks
from fibkv.training_settings import SHIPPED, TrainingSettings, shipped_settings

REPORTED_DIMS = (64, 128)
"""Dimensions at which every report gives the held-out distortion, beside the training dimension."""

# Restarts are compared after training on this part of the samples, but on no fewer than the floor: which optimum a
# start leads to shows early, and only the best one is worth all samples.
_COMPARED_PART = 8
_COMPARED_FLOOR = 1 << 17
_CHUNK = 1 << 20


def build(
    block_dim: int, size: int, settings: TrainingSettings, *, seed: int = 0, progress: Progress = silent
) -> Codebook:
    """Trains a codebook; for k = 1 solves for it.

    Args:
        block_dim: k, below ``settings.head_dim``.
        size: N.
        settings: budget and source dimension.
        seed: of all samples and starts. The result is reproducible up to the rounding of the machine's matrix products.
        progress: told after every iteration.

    Raises:
        ContractError: ``block_dim`` or ``size`` is out of range.
        CodebookError: the scalar code did not converge.
    """
    if not 0 < block_dim < settings.head_dim:
        raise ContractError("build.block_dim", f"between 1 and head_dim {settings.head_dim} - 1", block_dim)
    if size < 2:
        raise ContractError("build.size", "at least 2", size)
    if block_dim == 1:
        code = lloyd_max_scalar(settings.head_dim, size)
        words = torch.from_numpy(code.levels[:, None]).to(torch.float32)
        return _report(Refined(words, code.distortion, code.iterations), 0, 0, settings, seed)
    samples = _samples(settings.head_dim, block_dim, settings.samples_per_codeword * size, (seed, 0))
    generator = torch.Generator().manual_seed(seed)
    restart, best = _best_restart(samples, size, settings, seed, generator, progress)
    final = _refine(samples, best.codewords, settings, generator, _watch(progress, settings, settings.restarts))
    iterations = best.iterations + final.iterations
    return _report(Refined(final.codewords, final.distortion, iterations), len(samples), restart, settings, seed)


def build_shipped(directory: Path, *, progress: Progress = silent) -> None:
    """Rebuilds the codebooks of the package, `SHIPPED`, into a directory, one file each.

    Args:
        directory: made if absent; files of the same names are replaced.
        progress: told after every iteration of each book.
    """
    for block_dim, size in SHIPPED:
        write(directory / file_name(block_dim, size), build(block_dim, size, shipped_settings(size), progress=progress))


def _best_restart(
    samples: Tensor, size: int, settings: TrainingSettings, seed: int, generator: torch.Generator, progress: Progress
) -> tuple[int, Refined]:
    """The restart whose codebook is best on held-out samples, and its number."""
    block_dim = samples.shape[1]
    compared = samples[: max(len(samples) // _COMPARED_PART, _COMPARED_FLOOR)]
    held_out = _samples(settings.head_dim, block_dim, settings.holdout_samples, (seed, 1))
    random = np.random.default_rng((seed, 2))
    best: tuple[float, int, Refined] | None = None
    for restart in range(settings.restarts):
        start = _start(restart, compared, size, settings.head_dim, random)
        refined = _refine(compared, start, settings, generator, _watch(progress, settings, restart))
        distortion = assign(held_out, refined.codewords).distortion
        if best is None or distortion < best[0]:
            best = distortion, restart, refined
    assert best is not None, "TrainingSettings asks for at least one restart"
    return best[1:]


def _start(restart: int, samples: Tensor, size: int, head_dim: int, random: np.random.Generator) -> Tensor:
    """Even restarts take the paper's initial codebook, turned at random; odd ones take samples.

    The source looks alike from all sides, so turned copies mostly end in the same optimum: at k = 4, N = 16 they miss
    one that is 1.2 % better.
    """
    block_dim = samples.shape[1]
    if restart % 2:
        return samples[torch.from_numpy(random.choice(len(samples), size, replace=False))]
    turn = stats.ortho_group.rvs(block_dim, random_state=random)
    words = initial_codewords(head_dim, block_dim, size) @ turn * math.sqrt(head_dim)
    return torch.from_numpy(words).to(torch.float32)


def _refine(
    samples: Tensor,
    start: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator,
    watch: Callable[[int, float], None],
) -> Refined:
    return refine(
        samples,
        start,
        max_iterations=settings.max_iterations,
        relative_tolerance=settings.relative_tolerance,
        generator=generator,
        on_iteration=watch,
    )


def _watch(progress: Progress, settings: TrainingSettings, stage: int) -> Callable[[int, float], None]:
    """Translates iterations of one stage (a restart, or the last refinement) to progress over all of them."""
    length = settings.max_iterations + 1
    total = (settings.restarts + 1) * length
    note = f"restart {stage + 1} of {settings.restarts}" if stage < settings.restarts else "refining the best"
    return lambda iteration, distortion: progress(stage * length + iteration, total, f"{note}, D = {distortion:.5f}")


def _report(refined: Refined, training_samples: int, restart: int, settings: TrainingSettings, seed: int) -> Codebook:
    size, block_dim = refined.codewords.shape
    dims = sorted({settings.head_dim, *(dim for dim in REPORTED_DIMS if dim > block_dim)})
    held_out = tuple(
        HeldOut(
            head_dim=dim,
            distortion=assign(
                _samples(dim, block_dim, settings.holdout_samples, (seed, 3)), refined.codewords
            ).distortion,
        )
        for dim in dims
    )
    digest = codebook_digest(refined.codewords)
    report = CodebookReport(
        block_dim=block_dim,
        size=size,
        seed=seed,
        training=settings,
        training_samples=training_samples,
        restart=restart,
        iterations=refined.iterations,
        train_distortion=refined.distortion,
        held_out=held_out,
        codebook_digest=digest,
    )
    return Codebook(block_dim, size, refined.codewords, digest, report)


def _samples(head_dim: int, block_dim: int, count: int, stream: tuple[int, int]) -> Tensor:
    """Blocks ``[count, k]`` float32, scaled so that a coordinate has variance 1, from a random stream of their own."""
    random = np.random.default_rng(stream)
    samples = torch.empty(count, block_dim)
    for chunk in samples.split(_CHUNK):
        blocks = sample_blocks(head_dim, block_dim, len(chunk), random) * math.sqrt(head_dim)
        chunk.copy_(torch.from_numpy(blocks))
    return samples
