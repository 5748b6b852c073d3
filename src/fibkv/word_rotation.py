"""Hadamard rotations in 16-bit integers, for encoders in a hurry: the fast search of trellis codes.

A vector is scaled to one length, rounded to integers and rotated in them. What comes out differs from the rotation by
d / 45000 of a coordinate's standard deviation (rms; .003 at d = 128), and is the same everywhere: integers add up in
any order, and what comes before them is single IEEE 754 operations in a fixed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor, sqrt

import numpy as np
import torch
from torch import Tensor

from fibkv.constants import constant
from fibkv.rotation import HADAMARD_ROUNDS, Rotation, hadamard_signs, walsh_hadamard

MOST_LENGTH = 31900
"""How long a vector may be behind the first round's transform, roundings not counted (`fits` has why)."""

# Factors of later rounds are multiples of 2^-15.
_FRACTION_BITS = 15
# Squares of float32 numbers whose sum lies between these neither overflow nor lose bits that count.
_LEAST, _MOST = 2.0**-66, 2.0**66


@dataclass(frozen=True, slots=True, eq=False)
class WordRotation:
    """A rotation in integers.

    Attributes:
        factors: ``[rounds, d]`` int32, what multiplies coordinates before a transform, in 2^-15: signs times
            1 / sqrt(d) rounded down. Of the first round the signs alone count.
        length: of a vector when it is rounded to integers, a float32.
        unit: what 1 is worth behind the rotation, a float32.
    """

    factors: Tensor
    length: float
    unit: float

    def apply(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates vectors ``[..., d]`` float32.

        Returns:
            Rotated unit vectors ``[..., d]`` float32 and the vectors' lengths ``[..., 1]`` float64.
        """
        power = _power(rows)
        rows = (rows.to(torch.float64) / power).to(torch.float32)
        length = _energy(rows).to(torch.float64).sqrt()
        scale = self.length * (1.0 / length).masked_fill(length == 0, 0.0)
        words = (rows * scale.to(torch.float32)).round().to(torch.int32)
        first, *later = constant(self.factors, rows.device)
        words = walsh_hadamard(words * first.sign())
        for factors in later:
            words = walsh_hadamard(words * factors + (1 << _FRACTION_BITS - 1) >> _FRACTION_BITS)
        return words.to(torch.float32) * self.unit, length * power


def fits(rotation: Rotation) -> bool:
    """Whether 16 bits hold a rotation: that is, whether no vector can leave them.

    Later factors are at most 1 / sqrt(d), so a vector grows by roundings alone: each round begins with some of at most
    1/2 in d coordinates, a vector of sqrt(d) / 2 or less that the transform makes d / 2. Within a transform vectors
    are shorter than behind it, and no coordinate is longer than its vector.
    """
    return rotation.kind == "hadamard" and MOST_LENGTH + HADAMARD_ROUNDS * rotation.dim / 2 < 2**15


@lru_cache(maxsize=64)
def word_rotation(rotation: Rotation) -> WordRotation:
    """The integer form of a rotation that `fits`; cached in the process."""
    root = sqrt(rotation.dim)
    factor = floor(2**_FRACTION_BITS / root)
    length = np.float32(MOST_LENGTH / root)
    # The first transform makes it sqrt(d) times as long. Later rounds shorten it, their factors being rounded down.
    growth = root * (factor / 2**_FRACTION_BITS * root) ** (HADAMARD_ROUNDS - 1)
    signs = hadamard_signs(rotation.dim, rotation.seed).to(torch.int32)
    return WordRotation(signs * factor, float(length), float(np.float32(1 / (float(length) * growth))))


def _power(rows: Tensor) -> Tensor:
    """What vectors are divided by ``[..., 1]`` float64: 1, and of a tiny or huge one the largest power of two that is
    not above its largest magnitude.
    """
    energy = _energy(rows)
    largest = rows.abs().amax(-1, keepdim=True).to(torch.float64)
    power = (largest.view(torch.int64) & 0x7FF << 52).view(torch.float64)
    return power.masked_fill((largest == 0) | (energy > _LEAST) & (energy < _MOST), 1.0)


def _energy(rows: Tensor) -> Tensor:
    """Sums of squares ``[..., 1]`` float32, of every fourth coordinate in turn."""
    parts = torch.zeros_like(rows[..., :4])
    for squares in rows.square().split(4, -1):
        parts += squares
    pairs = parts[..., ::2] + parts[..., 1::2]
    return pairs[..., :1] + pairs[..., 1:]
