"""Rotations in 16-bit integers: close to the rotation, for every input, and never out of 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibkv.rotation import HADAMARD_ROUNDS, Rotation, hadamard_signs, rotation, walsh_hadamard
from fibkv.word_rotation import MOST_LENGTH, WordRotation, fits, word_rotation
from tests.codecs.conformance import gaussian

DIMS = (16, 32, 64, 128, 256)
each_dim = pytest.mark.parametrize("dim", DIMS)


def exactly(rows: Tensor, turn: Rotation) -> Tensor:
    """Unit vectors of ``rows [V, d]``, rotated, ``[V, d]`` float64."""
    wide = rows.to(torch.float64)
    return wide / wide.norm(dim=-1, keepdim=True) @ turn.matrix.to(torch.float64).T


def piled_up(dim: int) -> Tensor:
    """Vectors ``[V, d]`` float32 that lie on a single coordinate behind one of the rounds: nothing is longer there."""
    piles = []
    for count in range(HADAMARD_ROUNDS + 1):
        vectors = torch.eye(dim, dtype=torch.float64)[:: dim // 8]
        for signs in hadamard_signs(dim, 0)[:count].flip(0):
            vectors = walsh_hadamard(vectors) * signs / dim**0.5
        piles.append(vectors)
    return torch.cat(piles).to(torch.float32)


@each_dim
def test_close_to_the_rotation(dim: int) -> None:
    turn = rotation("hadamard", dim, 0)
    rows = torch.cat([gaussian(1, 200, dim, seed=1)[0], piled_up(dim)])
    rotated, length = word_rotation(turn).apply(rows)
    assert rotated.dtype == torch.float32
    torch.testing.assert_close(length.squeeze(-1), rows.double().norm(dim=-1), rtol=1e-6, atol=0)
    errors = (rotated - exactly(rows, turn)).square().mean(-1).sqrt() * dim**0.5
    # Each of six rounds rounds coordinates of MOST_LENGTH / d steps, by 1 / sqrt(12) steps.
    assert float(errors.max()) < 1.5 * dim / MOST_LENGTH, "sqrt(6 / 12) on average"


@each_dim
def test_no_vector_leaves_16_bits(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    def watched(words: Tensor) -> Tensor:
        nonlocal largest
        span = 1
        while span < dim:
            low, high = words.unflatten(-1, (-1, 2, span)).unbind(-2)
            words = torch.stack([low + high, low - high], -2).flatten(-3)
            largest = max(largest, int(words.abs().max()))
            span *= 2
        return words

    monkeypatch.setattr("fibkv.word_rotation.walsh_hadamard", watched)
    turn = word_rotation(rotation("hadamard", dim, 0))
    turn.apply(torch.cat([gaussian(1, 200, dim, seed=2)[0], piled_up(dim)]))
    assert MOST_LENGTH / 2 < largest < 2**15, "some come near to the bound, none beyond it"


@pytest.mark.parametrize("power", [-140, -100, -60, 60, 120])
def test_tiny_and_huge_vectors(power: int) -> None:
    """Powers of two change lengths alone, as long as numbers keep their bits."""
    turn = word_rotation(rotation("hadamard", 64, 0))
    rows = gaussian(1, 50, 64, seed=3)[0].bfloat16().float() if power > -126 else torch.eye(64)
    expected, length = turn.apply(rows)
    found, scaled = turn.apply((rows.double() * 2.0**power).float())
    torch.testing.assert_close(scaled, length * 2.0**power, rtol=1e-6, atol=0)
    # Sums of squares are rounded elsewhere: a coordinate may be a step apart.
    torch.testing.assert_close(found, expected, rtol=0, atol=2.5 * turn.unit)


def test_zero_stays_zero() -> None:
    rotated, length = word_rotation(rotation("hadamard", 32, 0)).apply(torch.zeros(3, 32))
    assert not rotated.any()
    assert not length.any()


def test_independent_of_the_batch() -> None:
    turn = word_rotation(rotation("hadamard", 128, 5))
    rows = gaussian(1, 40, 128, seed=4)[0] * torch.logspace(-30, 30, 40).unsqueeze(-1)
    together, lengths = turn.apply(rows)
    for row, rotated, length in zip(rows, together, lengths, strict=True):
        alone, of_one = turn.apply(row)
        assert torch.equal(alone, rotated)
        assert torch.equal(of_one, length)


def test_which_rotations_fit() -> None:
    assert [dim for dim in (16, 256, 512) if fits(rotation("hadamard", dim, 0))] == [16, 256]
    assert not fits(rotation("haar", 64, 0))


def test_one_object_per_rotation() -> None:
    turn = rotation("hadamard", 64, 0)
    assert isinstance(word_rotation(turn), WordRotation)
    assert word_rotation(turn) is word_rotation(turn)
