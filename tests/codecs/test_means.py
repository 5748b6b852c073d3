"""Means of groups: exact as they are stored, worth their bytes, met by the query as they are."""

from __future__ import annotations

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import codec_for
from fibkv.means import LIMIT, decode_means, encode_means, means_in_place
from fibkv.parameters import FibParameters
from fibkv.rotation import rotation
from tests.codecs.conformance import gaussian, relative_mse

ROTATION = rotation("hadamard", 64, 0).matrix


def biased(*shape: int, size: float = 2.0) -> torch.Tensor:
    return gaussian(*shape) + size * gaussian(*shape[:-2], 1, shape[-1], seed=5)


def test_what_is_subtracted_is_what_is_stored() -> None:
    mean = biased(3, 40, 64).double().mean(-2)
    codes, taken = encode_means(mean, ROTATION)
    assert codes.shape == (3, 65)
    assert torch.equal(taken, means_in_place(codes, ROTATION))
    torch.testing.assert_close(taken @ ROTATION.T, decode_means(codes), rtol=0, atol=1e-5)
    # In the rotated space the stored mean is the true one to half a step of 2 ** e.
    step = torch.exp2(codes[:, :1].double())
    assert ((decode_means(codes) - mean @ ROTATION.T.double()).abs() <= 0.5 * step + 1e-9).all()
    assert (codes[:, 1:].abs().amax(-1) > LIMIT // 2).all()


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 3e38])
def test_means_of_any_magnitude_are_finite(size: float) -> None:
    codes, taken = encode_means(torch.full((1, 64), size, dtype=torch.float64), ROTATION)
    assert torch.isfinite(decode_means(codes)).all()
    assert torch.isfinite(taken).all()


def test_a_group_without_a_mean_has_one_form() -> None:
    rows = gaussian(1, 8, 64)
    codec = codec_for(FibParameters.of(64, 2, 256, centered=True))
    codes = codec.encode(torch.cat([rows, -rows], 1))
    assert not codes.mean.any()


def test_vectors_of_zero_err_by_what_the_others_do() -> None:
    rows = biased(1, 16, 64)
    rows[0, 3] = 0
    codec = codec_for(FibParameters.of(64, 2, 256, centered=True))
    mean = rows.mean(-2)
    error = codec.decode(codec.encode(rows))[0, 3].square().sum()
    assert error < 0.01 * mean.square().sum()


@pytest.mark.parametrize("book", [(2, 256), (4, 256)])
def test_a_shared_mean_costs_no_error(book: tuple[int, int]) -> None:
    """As exact as vectors without the mean, relative to those; the plain code errs in proportion to the whole."""
    plain, centered = (codec_for(FibParameters.of(64, *book, centered=flag)) for flag in (False, True))
    noise, rows = gaussian(4, 64, 64), biased(4, 64, 64)

    def error(codec: object, rows: torch.Tensor) -> float:
        return float((rows - codec.decode(codec.encode(rows))).square().sum() / noise.square().sum())

    assert error(centered, rows) < 1.01 * error(plain, noise)
    assert error(plain, rows) > 3 * error(plain, noise)


def test_logits_on_integers_take_the_mean_exactly() -> None:
    """A mean that is a hundred times the rest: what byte products round is the rest alone."""
    codec = codec_for(FibParameters.of(64, 2, 256, centered=True))
    keys, values = codec.encode(biased(1, 48, 64, size=100.0)), codec.encode(gaussian(1, 48, 64))
    query = gaussian(1, 4, 64, seed=2)
    rotated = kernels.rotate(query, codec.tables)
    lses = [
        kernels.attend(rotated, keys, codec.tables, values, codec.tables, scale=0.1, implementation=name)[1]
        for name in ("reference", "auto")
    ]
    torch.testing.assert_close(lses[0], lses[1], rtol=0, atol=0.02)
    assert lses[0].abs().max() > 30
    assert relative_mse(biased(1, 48, 64, size=100.0), codec.decode(keys)) < 1e-5
