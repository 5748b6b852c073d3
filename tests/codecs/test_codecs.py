"""Every codec against the conformance suite."""

from __future__ import annotations

from fibkv.codecs import CODECS, codec_for
from fibkv.parameters import (
    AffineParameters,
    FibParameters,
    Fp8Parameters,
    Int8Parameters,
    RawParameters,
    TrellisParameters,
)
from tests.codecs.allocations import ONE_HEAD
from tests.codecs.conformance import CodecConformance, OnKernels, gaussian, relative_mse, write_golden


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
    native_name = "fib4_table_d128_native"
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


if __name__ == "__main__":
    # Writes the golden files anew: python -m tests.codecs.test_codecs
    for suite in CodecConformance.__subclasses__():
        codec = codec_for(suite.parameters, suite.axis)
        print(suite.name, write_golden(OnKernels(codec, "reference"), suite.name))
        if suite.native_name is not None:
            print(suite.native_name, write_golden(OnKernels(codec, "native"), suite.native_name))
