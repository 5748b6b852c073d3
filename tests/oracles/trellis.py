"""Oracle of trellis-coded quantization: a tail-biting bitshift trellis, table and all, in plain torch.

Every coordinate shifts K new bits into a window of L bits, and the window indexes a table of 2^L levels. The window
wraps around the vector, so that a vector of T coordinates takes exactly K * T bits: there is no start state to store.

Encoding needs two Viterbi passes. The first, free at both ends, runs over the vector rotated by half and shows what
the window holds at the seam; the second runs over the vector with the seam held to that.

Run as a script, this module trains the tables again and writes ``trellis_tables.npy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WINDOW = 8
TABLES = Path(__file__).with_name("trellis_tables.npy")


@dataclass(frozen=True)
class Trellis:
    """A code of ``bits`` per coordinate.

    Attributes:
        bits: K, 1..4.
        table: ``[2^L]`` float32 levels, in units in which a coordinate has variance 1.
    """

    bits: int
    table: Tensor

    @property
    def window(self) -> int:
        """L."""
        return len(self.table).bit_length() - 1

    @property
    def overlap(self) -> int:
        """Number of values of the L - K bits that two neighbouring windows share."""
        return len(self.table) >> self.bits

    def encode(self, vectors: Tensor) -> Tensor:
        """Symbols ``[V, T]`` int64 in 0..2^K - 1 of vectors ``[V, T]`` float32."""
        half = vectors.shape[1] // 2
        free = self._viterbi(vectors.roll(half, dims=1), seam=None)
        # Window half - 1 of the rotated vectors is the last one of the vectors themselves.
        windows = self._viterbi(vectors, seam=free[:, half - 1] % self.overlap)
        return windows % (1 << self.bits)

    def windows(self, symbols: Tensor) -> Tensor:
        """Windows ``[V, T]`` of symbols ``[V, T]``: each holds the newest L bits, cyclically."""
        windows = torch.zeros_like(symbols)
        for age in reversed(range(-(-self.window // self.bits))):
            windows = ((windows << self.bits) | symbols.roll(age, dims=1)) % len(self.table)
        return windows

    def decode(self, symbols: Tensor) -> Tensor:
        """Vectors ``[V, T]`` float32 of symbols ``[V, T]``."""
        return self.table[self.windows(symbols)]

    def _viterbi(self, vectors: Tensor, seam: Tensor | None) -> Tensor:
        """The cheapest windows ``[V, T]``; with ``seam [V]``, those whose shared bits there are the given ones."""
        branches, states = 1 << self.bits, torch.arange(len(self.table))
        cost = (vectors[:, :1] - self.table).square()
        if seam is not None:
            cost = cost.masked_fill(states >> self.bits != seam[:, None], torch.inf)
        choices = []
        for column in vectors.T[1:]:
            # A window's predecessors share its high bits as their low ones: window w comes from j * overlap + w >> K.
            best, choice = cost.unflatten(1, (branches, self.overlap)).min(1)
            cost = (column[:, None] - self.table).square() + best.repeat_interleave(branches, dim=1)
            choices.append(choice)
        if seam is not None:
            cost = cost.masked_fill(states % self.overlap != seam[:, None], torch.inf)
        path = [cost.argmin(1)]
        for choice in reversed(choices):
            shared = path[-1] >> self.bits
            path.append(choice.gather(1, shared[:, None]).squeeze(1) * self.overlap + shared)
        return torch.stack(path[::-1], dim=1)


def unit_vectors(dim: int, count: int, seed: int) -> Tensor:
    """Uniformly random vectors ``[count, dim]`` float32 of norm sqrt(dim): of variance 1 per coordinate."""
    vectors = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=1, keepdim=True) * dim**0.5


def distortion(trellis: Trellis, vectors: Tensor) -> float:
    """D = E||u - u_hat||^2 of unit vectors, here of norm sqrt(T)."""
    return float((vectors - trellis.decode(trellis.encode(vectors))).square().double().mean())


def train(bits: int, *, dim: int = 128, count: int = 1500, passes: int = 40, seed: int = 0) -> Trellis:
    """A trellis with a trained table: shuffled Gaussian quantiles, then encoding and averaging per window, repeated."""
    generator = torch.Generator().manual_seed(seed)
    size = 1 << WINDOW
    quantiles = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size).float()
    trellis = Trellis(bits, quantiles[torch.randperm(size, generator=generator)])
    vectors = unit_vectors(dim, count, seed)
    for _ in range(passes):
        windows = trellis.windows(trellis.encode(vectors)).flatten()
        sums = torch.zeros(size).index_add_(0, windows, vectors.flatten())
        counts = torch.bincount(windows, minlength=size)
        trellis = Trellis(bits, torch.where(counts > 0, sums / counts.clamp(min=1), trellis.table))
    return trellis


def trained(bits: int) -> Trellis:
    """The trellis of 1 to 4 bits with its stored table."""
    return Trellis(bits, torch.from_numpy(np.load(TABLES)[bits - 1]))


if __name__ == "__main__":
    np.save(TABLES, np.stack([train(bits).table.numpy() for bits in (1, 2, 3, 4)]))
