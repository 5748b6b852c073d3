"""Every codec against the conformance suite, and what is particular to each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fibkv import kernels
from fibkv.codecs import CODECS, codec_for
from fibkv.codecs.fib import unit_distortion
from fibkv.codes import ScaledCodes
from fibkv.decision_table import decision_table
from fibkv.errors import EncodingError, PageError
from fibkv.parameters import (
    AffineParameters,
    FibParameters,
    Fp8Parameters,
    Int8Parameters,
    RawParameters,
    TrellisParameters,
)
from tests.codecs.allocations import ONE_HEAD
from tests.codecs.conformance import CodecConformance, gaussian, relative_mse, write_golden


class TestRawF32(CodecConformance):
    name, parameters = "raw_f32", RawParameters(head_dim=64, dtype="f32")
    distortion = hard_distortion = 0.0
    vector_nbytes, group_nbytes = 256, 0

    # Raw keeps what it is given: a page that fell back to raw may hold NaN.
    test_non_finite_vectors_are_refused = None


class TestRawBf16(CodecConformance):
    name, parameters = "raw_bf16", RawParameters(head_dim=128, dtype="bf16")
    distortion, hard_distortion = 2.8e-6, 1e-5
    vector_nbytes, group_nbytes = 256, 0

    test_non_finite_vectors_are_refused = None


class TestInt8(CodecConformance):
    name, parameters = "int8", Int8Parameters(head_dim=64)
    distortion, hard_distortion = 3.6e-5, 5e-4
    vector_nbytes, group_nbytes = 66, 0


class TestFp8(CodecConformance):
    name, parameters = "fp8", Fp8Parameters(head_dim=128)
    distortion, hard_distortion = 6.9e-4, 2e-3
    vector_nbytes, group_nbytes = 130, 0


class TestInt8PerChannel(CodecConformance):
    name, parameters, axis = "int8_per_channel", Int8Parameters(head_dim=64), "per_channel"
    distortion, hard_distortion = 3.6e-5, 5e-4
    vector_nbytes, group_nbytes = 66, 128


class TestAffine4(CodecConformance):
    name, parameters = "affine4", AffineParameters(head_dim=64, bits=4)
    distortion, hard_distortion = 0.0062, 0.015  # one large channel sets the grid of 31 others
    vector_nbytes, group_nbytes = 32 + 2 * 4, 0


class TestAffine3(CodecConformance):
    """A last group of 16 channels."""

    name, parameters = "affine3", AffineParameters(head_dim=80, bits=3)
    distortion, hard_distortion = 0.027, 0.03
    vector_nbytes, group_nbytes = 30 + 3 * 4, 0


class TestAffine2PerChannel(CodecConformance):
    name, parameters, axis = "affine2_per_channel", AffineParameters(head_dim=64, bits=2), "per_channel"
    distortion, hard_distortion = 0.21, 0.2
    vector_nbytes, group_nbytes = 16, 64 * 4

    # The grid of a channel runs between its ends in all tokens: zero need not be on it.
    test_zero_vectors_decode_to_zero = None
    test_tiny_vectors_stay_finite_and_tiny = None


class TestFib4(CodecConformance):
    name, parameters = "fib4_d128", FibParameters.of(128, 2, 256)
    distortion, hard_distortion = 0.00751, 0.0105
    vector_nbytes, group_nbytes = 65, 4


class TestFib4HalfNorm(CodecConformance):
    name, parameters = "fib4_d64_f16", FibParameters.of(64, 2, 256, norm_format="f16", gain_corrected=False)
    distortion, hard_distortion = 0.00754, 0.0105
    exponents = (-4, -2, 0, 2, 3)  # a norm of 8e4 is beyond float16
    vector_nbytes, group_nbytes = 34, 0


class TestFib3(CodecConformance):
    name, parameters = "fib3_d64", FibParameters.of(64, 2, 64)
    distortion, hard_distortion = 0.0282, 0.0395
    vector_nbytes, group_nbytes = 25, 4


class TestFib2(CodecConformance):
    name, parameters = "fib2_d128", FibParameters.of(128, 4, 256)
    distortion, hard_distortion = 0.0948, 0.133
    vector_nbytes, group_nbytes = 33, 4


class TestFib4ScaleSearch(CodecConformance):
    """The same format and decoder as TestFib4, at 10 % less error."""

    name, parameters = "fib4_scales_d128", FibParameters.of(128, 2, 256, scale_search=True)
    distortion, hard_distortion = 0.00665, 0.0093
    vector_nbytes, group_nbytes = 65, 4


class TestFib4Table(CodecConformance):
    name, parameters = "fib4_table_d128", FibParameters.of(128, 2, 256, codeword_search="table")
    distortion, hard_distortion = 0.00764, 0.0107
    vector_nbytes, group_nbytes = 65, 4


class TestFib2PerChannel(CodecConformance):
    name, parameters, axis = "fib2_d64_per_channel", FibParameters.of(64, 4, 256), "per_channel"
    distortion, hard_distortion = 0.0935, 0.2  # one channel holds the energy of some
    vector_nbytes, group_nbytes = 17, 4 + 128


class TestFib4Centered(CodecConformance):
    name, parameters = "fib4_centered_d64", FibParameters.of(64, 2, 256, scale_search=True, centered=True)
    distortion, hard_distortion = 0.0064, 0.0093
    vector_nbytes, group_nbytes = 33, 4 + 65

    # Zeros stand beside vectors whose mean is not zero: test_means.py has what becomes of them.
    test_zero_vectors_decode_to_zero = None
    test_tiny_vectors_stay_finite_and_tiny = None


class TestFib2CenteredHaarPerChannel(CodecConformance):
    name, axis = "fib2_centered_d80_per_channel", "per_channel"
    parameters = FibParameters.of(80, 4, 256, centered=True)
    distortion, hard_distortion = 0.092, 0.2
    vector_nbytes, group_nbytes = 21, 4 + 81 + 160

    test_zero_vectors_decode_to_zero = None
    test_tiny_vectors_stay_finite_and_tiny = None


class TestScalar3Haar(CodecConformance):
    """TurboQuant's scalar case at a head_dim that is no power of two."""

    name, parameters = "scalar3_d80", FibParameters.of(80, 1, 8)
    distortion, hard_distortion = 0.0329, 0.046
    vector_nbytes, group_nbytes = 31, 4


class TestTrellis2(CodecConformance):
    """A quarter less error than TestFib2 at the same size."""

    name, parameters = "trellis2_d128", TrellisParameters.of(128, 2)
    distortion, hard_distortion = 0.0708, 0.1
    vector_nbytes, group_nbytes = 33, 4


class TestTrellis3ScaleSearch(CodecConformance):
    name, parameters = "trellis3_d64_scales", TrellisParameters.of(64, 3, scale_search=True)
    distortion, hard_distortion = 0.0176, 0.0246
    vector_nbytes, group_nbytes = 25, 4


class TestTrellis4Haar(CodecConformance):
    name, parameters = "trellis4_d40", TrellisParameters.of(40, 4, norm_format="f16", path_search="fast")
    distortion, hard_distortion = 0.0049, 0.007
    exponents = (-4, -2, 0, 2, 3)
    vector_nbytes, group_nbytes = 22, 0


class TestTrellis2PerChannel(CodecConformance):
    name, parameters, axis = "trellis2_d32_per_channel", TrellisParameters.of(32, 2), "per_channel"
    distortion, hard_distortion = 0.081, 0.2
    vector_nbytes, group_nbytes = 9, 4 + 64


class TestKlt(CodecConformance):
    """Made for pairs that fall in variance: white vectors lose the pairs without bits, one-hot ones nearly all."""

    name, parameters = "klt_d64", ONE_HEAD
    distortion, hard_distortion = 0.234, 0.9
    vector_nbytes, group_nbytes = 18, 4


def test_every_codec_has_a_suite() -> None:
    suites = [cls for cls in globals().values() if isinstance(cls, type) and issubclass(cls, CodecConformance)]
    assert {suite.parameters.codec for suite in suites if suite is not CodecConformance} == set(CODECS)


def test_per_channel_takes_out_a_large_channel() -> None:
    """Why the axis exists: a channel that is large in every key eats the norm of a per-token code."""
    keys = gaussian(1, 64, 64)
    keys[..., 5] = keys[..., 5] * 2 + 50
    plain, channel = (codec_for(FibParameters.of(64, 2, 256), axis) for axis in ("per_token", "per_channel"))
    others = [channel_index for channel_index in range(64) if channel_index != 5]

    def error(codec: object) -> float:
        return relative_mse(keys[..., others], codec.decode(codec.encode(keys))[..., others])

    assert error(channel) < error(plain) / 10


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


def test_log_norm_costs_little() -> None:
    """8-bit log norms against float16 ones: notes say +0.5 % at 4 bits over 8 octaves."""
    rows = gaussian(8, 64, 128) * torch.exp2(torch.rand(8, 64, 1, generator=torch.Generator().manual_seed(1)) * 8)
    half, log8 = (codec_for(FibParameters.of(128, 2, 256, norm_format=name)) for name in ("f16", "log8"))
    errors = [
        float(((rows - codec.decode(codec.encode(rows))).square().sum(-1) / rows.square().sum(-1)).mean())
        for codec in (half, log8)
    ]
    assert errors[1] < 1.01 * errors[0]


def test_gain_lowers_the_error_of_every_vector() -> None:
    rows = gaussian(1, 512, 64)
    plain, gained = (
        codec_for(FibParameters.of(64, 2, 256, norm_format="f16", gain_corrected=flag)) for flag in (False, True)
    )
    errors = [(rows - codec.decode(codec.encode(rows))).square().sum(-1) for codec in (plain, gained)]
    # Up to the rounding of the float16 norm.
    assert (errors[1] <= errors[0] * (1 + 1e-3) + 1e-6 * rows.square().sum(-1)).all()
    assert errors[1].mean() < errors[0].mean() * 0.985


@pytest.mark.parametrize(
    ("block_dim", "size", "gained"), [(2, 256, 0.095), (1, 16, 0.12), (2, 64, 0.045), (4, 256, 0.01)]
)
def test_scale_search_lowers_the_error(block_dim: int, size: int, gained: float) -> None:
    rows = gaussian(4, 128, 128)
    errors = []
    for search in (False, True):
        codec = codec_for(FibParameters.of(128, block_dim, size, scale_search=search))
        errors.append(relative_mse(rows, codec.decode(codec.encode(rows))))
    assert errors[1] < (1 - gained) * errors[0]


def test_scale_search_keeps_the_factor_with_the_smallest_angle() -> None:
    """By hand: the codes of each factor alone, and their directions."""
    tables = codec_for(FibParameters.of(64, 2, 64, scale_search=True)).tables
    rows = gaussian(1, 32, 64)
    cosines = []
    for scale in tables.scales:
        one = replace(tables, scales=(scale,))
        cosines.append(torch.cosine_similarity(rows, kernels.decode(kernels.encode(rows, one), one), dim=-1))
    found = torch.cosine_similarity(rows, kernels.decode(kernels.encode(rows, tables), tables), dim=-1)
    torch.testing.assert_close(found, torch.stack(cosines).amax(0))
    assert tables.scales == pytest.approx((1 / 1.16, 1.16**-0.5, 1.0, 1.16**0.5, 1.16))


def test_a_decision_table_finds_nearest_or_nearly_nearest_codewords() -> None:
    words = codec_for(FibParameters.of(128, 2, 256)).tables.codewords
    table = decision_table(words)
    assert table.cells.shape == (table.side, table.side) == (256, 256)
    assert table.cells.unique().numel() == 256
    # A codeword is well inside its own cell of the plane.
    assert table.look_up(words).tolist() == list(range(256))
    points = gaussian(4096, 2) / 128**0.5
    distances = torch.cdist(points, words)
    chosen = distances.gather(1, table.look_up(points).long().unsqueeze(-1)).squeeze(-1)
    diagonal = 2 * table.extent / table.side * 2**0.5
    inside = points.abs().amax(-1) < table.extent
    assert (chosen <= distances.amin(1) + diagonal)[inside].all()
    # Beyond the square the cells of its border decide.
    assert table.look_up(torch.tensor([[9.0, -9.0]])) == table.cells[-1, 0]


BOUNDS = {(1, 4): 0.1162, (2, 16): 0.1068, (4, 256): 0.0962, (2, 64): 0.0296, (2, 256): 0.00772, (8, 256): 0.322}


@pytest.mark.parametrize(("block_dim", "size"), [*BOUNDS, (16, 256)])
def test_distortion_of_the_codec_on_unit_vectors(block_dim: int, size: int) -> None:
    """At d = 128 with a float16 norm and no gain; the gain lowers it."""
    bound = {**BOUNDS, (16, 256): 0.581}[block_dim, size]
    plain, gained = (
        unit_distortion(
            FibParameters.of(128, block_dim, size, norm_format="f16", gain_corrected=flag), vectors=8000, seed=99
        )
        for flag in (False, True)
    )
    assert 0.95 * bound <= plain <= bound
    assert gained < plain


@pytest.mark.parametrize("book", [(1, 16), (2, 256), (4, 256)])
def test_hadamard_is_as_good_as_haar_on_gaussian_vectors(book: tuple[int, int]) -> None:
    """T12: less than 1 % apart."""
    rows = gaussian(16, 512, 64)
    errors = []
    for kind in ("hadamard", "haar"):
        codec = codec_for(FibParameters.of(64, *book, rotation=kind))
        errors.append(relative_mse(rows, codec.decode(codec.encode(rows))))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("size", [5, 100, 300, 1000])
def test_odd_codebook_sizes(size: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """N that is no power of two, and N beyond a byte."""
    monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path))
    codec = codec_for(FibParameters.of(32, 1, size))
    rows = gaussian(2, 16, 32)
    codes = codec.encode(rows)
    assert relative_mse(rows, codec.decode(codes)) < {5: 0.09, 100: 5e-4, 300: 2e-4, 1000: 1e-4}[size]
    data = bytearray(codec.to_bytes(codes))
    codec.from_bytes(memoryview(bytes(data)), 2, 16)
    if size != 1000:
        data[-1] |= 0xE0
    with pytest.raises(PageError, match=f"codes inside the codebook of {size} words"):
        codec.from_bytes(
            memoryview(bytes(data[: -codec.vector_nbytes + 1]) + b"\xff" * (codec.vector_nbytes - 1)), 2, 16
        )


class TestRefusedCodes:
    """Codes that no encoder makes are refused by name, whatever digest comes with them."""

    def refuse(self, codec: object, codes: object, match: str) -> None:
        data = codec.to_bytes(codes)
        with pytest.raises(PageError, match=match):
            codec.from_bytes(memoryview(data), 1, 2)

    def test_scaled(self) -> None:
        codec = codec_for(Int8Parameters(head_dim=64))
        codes = codec.encode(gaussian(1, 2, 64))
        bad = codes.values.clone()
        bad[0, 1, 3] = -128
        self.refuse(codec, ScaledCodes(codes.scales, bad), r"'values': expected numbers in -127..127, 1 of 128")
        self.refuse(codec, ScaledCodes(-codes.scales, codes.values), "'scales': expected finite numbers >= 0, 2 of 2")
        self.refuse(codec, ScaledCodes(codes.scales * torch.nan, codes.values), "'scales'")

    def test_fp8_nan(self) -> None:
        codec = codec_for(Fp8Parameters(head_dim=64))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.values.view(torch.uint8)[0, 0, 0] = 0x7F
        self.refuse(codec, codes, r"'values': expected numbers in -448..448, 1 of 128")

    def test_fib(self) -> None:
        codec = codec_for(FibParameters.of(64, 2, 256, norm_format="f16"))
        codes = codec.encode(gaussian(1, 2, 64))
        self.refuse(codec, replace(codes, norms=codes.norms * torch.inf), "'norms'")
        log8 = codec_for(FibParameters.of(64, 2, 256))
        codes = log8.encode(gaussian(1, 2, 64))
        self.refuse(log8, replace(codes, norm_range=codes.norm_range * torch.nan), "'norm_range'")
        huge = torch.tensor([[120.0, 1.0]], dtype=torch.float16)
        self.refuse(log8, replace(codes, norm_range=huge), "norms within float32")

    @pytest.mark.parametrize(("place", "number", "match"), [(0, 121, "power of two in -126..120"), (5, -128, "-127")])
    def test_means(self, place: int, number: int, match: str) -> None:
        codec = codec_for(FibParameters.of(64, 2, 256, centered=True))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.mean[0, place] = number
        self.refuse(codec, codes, f"'mean': expected .*{match}")

    @pytest.mark.parametrize("axis", ["per_token", "per_channel"])
    def test_affine(self, axis: str) -> None:
        codec = codec_for(AffineParameters(head_dim=33, bits=2), axis)
        codes = codec.encode(gaussian(1, 2, 33))
        self.refuse(codec, replace(codes, grid=codes.grid * torch.nan), "'grid': expected finite numbers")
        self.refuse(codec, replace(codes, grid=-codes.grid.abs()), "'grid': expected steps >= 0")
        codes.values[0, 1, -1] |= 0x80
        self.refuse(codec, codes, "zero bits behind the last number")

    def test_stray_bits(self) -> None:
        codec = codec_for(FibParameters.of(20, 2, 64))  # 10 indices of 6 bits: 4 filling bits
        codes = codec.encode(gaussian(1, 2, 20))
        codes.indices[0, 1, -1] |= 0x80
        self.refuse(codec, codes, "zero bits behind the last index")

    def test_raw(self) -> None:
        codec = codec_for(RawParameters(head_dim=64, dtype="f16"))
        codes = codec.encode(gaussian(1, 2, 64))
        codes.values[0, 0, 0] = torch.inf
        self.refuse(codec, codes, r"'values': expected finite numbers, 1 of 128")


if __name__ == "__main__":
    # Writes the golden files anew: python -m tests.codecs.test_codecs
    for suite in CodecConformance.__subclasses__():
        print(suite.name, write_golden(codec_for(suite.parameters, suite.axis), suite.name))
