"""What cannot be encoded is refused at once, or, where nobody may wait for a device, found later."""

from __future__ import annotations

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import codec_for
from fibkv.errors import EncodingError
from fibkv.kernels.refusals import checked_later
from fibkv.parameters import AffineParameters, FibParameters, Int8Parameters, RawParameters, named_parameters
from tests.codecs.conformance import equal, gaussian, relative_mse
from tests.codecs.waits import Waits

TRITON = ["triton"] if kernels.available()["triton"] == "yes" else []
CODECS = ["fib4", "fib2", "scalar4", "key3", "trellis2", "affine4", "int8", "fp8", "raw"]
AXES = ["per_token", "per_channel"]


def encoder(name: str, axis: str):
    return codec_for(named_parameters(name, 64, "f16"), axis)


@pytest.mark.parametrize("implementation", ["reference", *TRITON])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", CODECS)
def test_encoding_waits_for_no_device_if_refusals_can_wait(name: str, axis: str, implementation: str) -> None:
    codec, rows = encoder(name, axis), gaussian(2, 8, 64)
    expected = codec.encode(rows, implementation=implementation)
    with checked_later() as checks, Waits() as waits:
        codes = codec.encode(rows, implementation=implementation)
        broken = checks.any()
    assert waits.found == []
    assert not broken
    assert equal(codes, expected)


@pytest.mark.parametrize("implementation", ["reference", *TRITON])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_refused_at_once_is_found_later(name: str, implementation: str, bad: float) -> None:
    codec, rows = encoder(name, "per_token"), gaussian(2, 8, 64)
    rows[1, 3, 5] = bad
    with checked_later() as checks:
        codec.encode(rows, implementation=implementation)
    try:
        codec.encode(rows, implementation=implementation)
    except EncodingError:
        assert checks.any()
    else:
        assert not checks.any()


def test_later_ends_with_its_context() -> None:
    codec, rows = encoder("fib4", "per_token"), torch.full((1, 2, 64), torch.nan)
    with checked_later():
        codec.encode(rows, implementation="reference")
    with pytest.raises(EncodingError, match="must be finite"):
        codec.encode(rows, implementation="reference")


def test_one_bad_group_does_not_hide_behind_good_ones() -> None:
    rows = gaussian(4, 3, 64)
    rows[2, 1] = torch.nan
    with pytest.raises(EncodingError, match="64 NaN"):
        codec_for(Int8Parameters(head_dim=64)).encode(rows)


def test_half_norm_overflow_is_refused_and_log_norm_holds_it() -> None:
    rows = gaussian(1, 2, 64) * 1e6
    with pytest.raises(EncodingError, match=r"at most 65504 to be stored as float16, got 8"):
        codec_for(FibParameters.of(64, 2, 256, norm_format="f16")).encode(rows)
    log8 = codec_for(FibParameters.of(64, 2, 256))
    assert relative_mse(rows, log8.decode(log8.encode(rows))) < 0.01


def test_norms_beyond_float32_are_refused() -> None:
    with pytest.raises(EncodingError, match="finite in float32"):
        codec_for(FibParameters.of(64, 2, 256)).encode(torch.full((1, 1, 64), 3e38))


def test_grids_beyond_float16_are_refused() -> None:
    with pytest.raises(EncodingError, match=r"at most 65504 for grids in float16, got 1e\+06"):
        codec_for(AffineParameters(head_dim=64, bits=4)).encode(torch.full((1, 2, 64), 1e6))


def test_raw_overflow_is_refused() -> None:
    with pytest.raises(EncodingError, match=r"exceed torch\.float16: largest magnitude 7e"):
        codec_for(RawParameters(head_dim=64, dtype="f16")).encode(torch.full((1, 1, 64), 7e4))
