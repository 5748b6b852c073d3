"""The suite that every codec passes by subclassing `CodecConformance`: add a file with a subclass and golden bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fibkv import kernels
from fibkv.codecs import Codec, codec_for
from fibkv.codes import Codes
from fibkv.digest import digest_bytes
from fibkv.errors import EncodingError, KernelError, PageError
from fibkv.parameters import CodecParameters

# Stated tolerances of native attention, relative to the rms of the output. Byte products round queries, weights and
# codewords to 8 bits on AVX-512 (int8 codes meet 16-bit queries and weights), and to 14, 14 and 10 bits on AVX2; 4-bit
# codes themselves err by 9 %, 2-bit codes by 31 %. Triton multiplies codes as float16 (TF32 for 16-bit raw ones, which
# its interpreter computes as float32). Everything else is float32.
BYTES, WORDS, HALVES, FLOATS = 0.03, 5e-3, 1e-3, 1e-5

GOLDEN = Path(__file__).parent / "golden"


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_mse(vectors: Tensor, decoded: Tensor) -> float:
    """E |x - y|^2 / E |x|^2 in float64: sees magnitude as well as direction."""
    vectors, decoded = vectors.double(), decoded.double()
    return float((vectors - decoded).square().sum() / vectors.square().sum())


def native_implementations() -> list[str]:
    """One per instruction set of this machine."""
    return [name for name, answer in kernels.available().items() if name.startswith("native-") and answer == "yes"]


def attend_error(implementation: str, *codecs: str) -> float:
    """The stated tolerance of attention on codes of these codecs."""
    if implementation in ("native-portable", "reference"):
        return FLOATS
    if implementation == "triton":
        return FLOATS if set(codecs) == {"raw"} else HALVES
    if any(name.startswith(("fib", "scalar", "centered", "trellis", "key", "value")) for name in codecs):
        best = kernels.resolve("native-avx512") if kernels.available()["native-avx512"] == "yes" else None
        if best is not None and kernels.resolve(implementation).isa == best.isa:
            return BYTES
        return FLOATS if all(name.startswith("trellis") for name in codecs) else WORDS
    return 2e-3 if "int8" in codecs else FLOATS


def equal(left: Codes, right: Codes) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for (_, a), (_, b) in zip(left.named(), right.named(), strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


class OnKernels(Codec):
    """A codec that encodes and decodes on one implementation of the kernels."""

    layout = assemble = check_fields = None

    def __init__(self, inner: Codec, implementation: str) -> None:
        self.inner, self.implementation = inner, implementation
        self.parameters, self.tables = inner.parameters, inner.tables
        self.layout, self.assemble, self.check_fields = inner.layout, inner.assemble, inner.check_fields

    def encode(self, rows: Tensor, *, implementation: str | None = None) -> Codes:
        return self.inner.encode(rows, implementation=implementation or self.implementation)

    def decode(self, codes: Codes, *, out: Tensor | None = None, implementation: str | None = None) -> Tensor:
        return self.inner.decode(codes, out=out, implementation=implementation or self.implementation)


class CodecConformance:
    """What a codec promises. Subclasses name the codec and its numbers."""

    name: str
    # Of the golden bytes of the native kernels, where their codes are not the reference's.
    native_name: str | None = None
    parameters: CodecParameters
    axis = "per_token"
    # E |x - y|^2 / E |x|^2 on Gaussian vectors: the codec's own figure, within 10 %.
    distortion: float
    # Largest E |x - y|^2 / E |x|^2 on hard vectors (one-hot, constant, one huge channel). The last two are one
    # direction under one rotation, a single draw: fib codecs allow 1.4 times their distortion.
    hard_distortion: float
    # Powers of ten over which magnitude is kept.
    exponents = (-4, -2, 0, 2, 4)
    # Per vector and per group of vectors, written out by hand: not computed by what is under test.
    vector_nbytes: int
    group_nbytes: int
    # The kernels under test; `attend` is held to dense attention on the decoded vectors within this relative error.
    implementation = "reference"
    attend_error = 1e-5

    @pytest.fixture
    def codec(self) -> Codec:
        return OnKernels(codec_for(self.parameters, self.axis), self.implementation)

    @property
    def dim(self) -> int:
        return self.parameters.head_dim

    def test_distortion(self, codec: Codec) -> None:
        rows = gaussian(2, 8, 64, self.dim)
        measured = relative_mse(rows, codec.decode(codec.encode(rows)))
        assert measured == pytest.approx(self.distortion, rel=0.1, abs=1e-12)

    def test_hard_vectors(self, codec: Codec) -> None:
        one_hot = torch.eye(self.dim)[: self.dim // 2 * 2].reshape(2, -1, self.dim)
        constant = torch.full((2, 16, self.dim), -3.25)
        huge = gaussian(2, 64, self.dim) + 100 * torch.eye(self.dim)[3]
        for rows in (one_hot, constant, huge):
            assert relative_mse(rows, codec.decode(codec.encode(rows))) <= self.hard_distortion

    def test_magnitude_is_kept(self, codec: Codec) -> None:
        for exponent in self.exponents:
            rows = gaussian(1, 32, self.dim) * 10.0**exponent
            measured = relative_mse(rows, codec.decode(codec.encode(rows)))
            assert measured <= max(1.1 * self.distortion, 1e-3), exponent

    def test_encoded_nbytes_is_exact(self, codec: Codec) -> None:
        assert codec.vector_nbytes == self.vector_nbytes
        for groups, tokens in ((1, 1), (3, 5), (8, 64)):
            codes = codec.encode(gaussian(groups, tokens, self.dim))
            expected = groups * (self.group_nbytes + tokens * self.vector_nbytes)
            assert codes.nbytes == codec.encoded_nbytes(groups, tokens) == len(codec.to_bytes(codes)) == expected

    def test_bytes_round_trip(self, codec: Codec) -> None:
        codes = codec.encode(gaussian(3, 7, self.dim))
        data = codec.to_bytes(codes)
        again = codec.from_bytes(memoryview(data), 3, 7)
        assert equal(codes, again)
        assert torch.equal(codec.decode(codes), codec.decode(again))

    def test_free_fields_may_hold_any_bytes_and_others_are_checked_together(self, codec: Codec) -> None:
        parts = [codec.to_bytes(codec.encode(gaussian(2, 5, self.dim, seed=seed))) for seed in (1, 2)]
        codec.check_bytes([memoryview(part) for part in parts], 2, 5)
        offset, noise = 0, random.Random(3)
        for field in codec.layout(5):
            nbytes = 2 * field.nbytes
            if field.name in codec.free_fields:
                damaged = bytearray(parts[1])
                damaged[offset : offset + nbytes] = noise.randbytes(nbytes)
                # Read without the shortcut.
                assert torch.isfinite(codec.decode(codec.from_bytes(memoryview(damaged), 2, 5))).all()
            elif field.dtype.is_floating_point and nbytes:
                damaged = bytearray(parts[1])
                damaged[offset : offset + nbytes] = b"\xff" * nbytes
                with pytest.raises(PageError, match=field.name):
                    codec.check_bytes([memoryview(parts[0]), memoryview(damaged)], 2, 5)
            offset += nbytes

    def test_golden_bytes(self, codec: Codec) -> None:
        """The format does not change silently: the bytes of fixed vectors, and what they decode to."""
        codes = codec.encode(_fixed_vectors(self.dim))
        golden = GOLDEN / f"{self.name}.bin"
        assert codec.to_bytes(codes) == golden.read_bytes()
        decoded = codec.decode(codes)
        assert relative_mse(_fixed_vectors(self.dim), decoded) <= max(1.5 * self.distortion, 1e-12)

    @pytest.mark.parametrize("cut", [0, 1, -1])
    def test_truncated_or_trailing_bytes_are_refused(self, codec: Codec, cut: int) -> None:
        data = codec.to_bytes(codec.encode(gaussian(2, 3, self.dim)))
        damaged = {0: b"", 1: data + b"\0", -1: data[:-1]}[cut]
        with pytest.raises(PageError, match=f"expected {len(data)} bytes, got {len(damaged)}"):
            codec.from_bytes(memoryview(damaged), 2, 3)

    def test_batches_encode_like_single_vectors(self, codec: Codec) -> None:
        rows = gaussian(5, 4, 16, self.dim)
        together = codec.encode(rows)
        for index in range(5):
            assert equal(together.map(lambda t, i=index: t[i]), codec.encode(rows[index]))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_input_gives_the_codes_of_its_float32_values(self, codec: Codec, dtype: torch.dtype) -> None:
        rows = gaussian(2, 16, self.dim).to(dtype)
        assert equal(codec.encode(rows), codec.encode(rows.to(torch.float32)))

    def test_zero_vectors_decode_to_zero(self, codec: Codec) -> None:
        rows = gaussian(2, 6, self.dim)
        rows[0, 2] = 0
        rows[1] = 0
        decoded = codec.decode(codec.encode(rows))
        assert torch.isfinite(decoded).all()
        assert not decoded[0, 2].any()
        assert not decoded[1].any()
        assert decoded[0, 1].any()

    def test_tiny_vectors_stay_finite_and_tiny(self, codec: Codec) -> None:
        rows = gaussian(1, 4, self.dim)
        rows[0, 1] *= 1e-40  # denormal in float32
        rows[0, 2] *= 1e-30
        decoded = codec.decode(codec.encode(rows))
        assert torch.isfinite(decoded).all()
        assert decoded[0, 1:3].abs().max() < 1e-6

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_vectors_are_refused(self, codec: Codec, bad: float) -> None:
        rows = gaussian(1, 3, self.dim)
        rows[0, 1, 2] = bad
        with pytest.raises(EncodingError, match="finite, got 1 NaN or infinite"):
            codec.encode(rows)

    def test_wrong_rows_are_refused(self, codec: Codec) -> None:
        with pytest.raises(KernelError, match=rf"expected shape \[..., T, {self.dim}\], got \[3, 5\]"):
            codec.encode(torch.zeros(3, 5))
        with pytest.raises(KernelError, match=r"expected a floating dtype, got torch.int64"):
            codec.encode(torch.zeros(3, self.dim, dtype=torch.int64))
        with pytest.raises(KernelError, match="at least one vector"):
            codec.encode(torch.zeros(0, self.dim))

    def test_decode_fills_all_of_a_poisoned_buffer(self, codec: Codec) -> None:
        codes = codec.encode(gaussian(2, 5, self.dim))
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full((2, 5, self.dim), float("nan"), dtype=dtype)
            assert codec.decode(codes, out=out) is out
            assert torch.equal(out, codec.decode(codes).to(dtype))

    def test_random_access(self, codec: Codec) -> None:
        """Reading one token alone equals the slice of the full decode (T12)."""
        codes = codec.encode(gaussian(3, 9, self.dim))
        full = codec.decode(codes)
        for token in (0, 4, 8):
            alone = codec.decode(codes.tokens(token, token + 1, lead=1))
            torch.testing.assert_close(alone, full[:, token : token + 1], rtol=1e-5, atol=1e-6)

    def test_scores_equal_decode_then_dot(self, codec: Codec) -> None:
        """T12: rotate q once and score on the codes; un-rotate the output once."""
        reference = kernels.resolve("reference")
        codes = codec.encode(gaussian(4, 33, self.dim))
        dense = codec.decode(codes)
        query = gaussian(4, 6, self.dim, seed=1)
        scores = reference.logits(kernels.rotate(query, codec.tables), codes, codec.tables)
        expected = query @ dense.transpose(-1, -2)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        weights = torch.softmax(scores, -1)
        out = kernels.unrotate(reference.mix(weights, codes, codec.tables), codec.tables)
        expected = weights @ dense
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    def test_attend_equals_dense_attention(self, codec: Codec) -> None:
        keys, values = codec.encode(gaussian(4, 40, self.dim)), codec.encode(gaussian(4, 40, self.dim, seed=1))
        query = gaussian(4, 6, self.dim, seed=2)
        mask = torch.rand(4, 6, 40, generator=torch.Generator().manual_seed(3)) > 0.3
        mask[0, 0] = False
        out, lse = kernels.attend(
            kernels.rotate(query, codec.tables),
            keys,
            codec.tables,
            values,
            codec.tables,
            scale=0.2,
            mask=mask,
            implementation=self.implementation,
        )
        out = kernels.unrotate(out, codec.tables).double()
        scores = (query @ codec.decode(keys).transpose(-1, -2) * 0.2).double().masked_fill(~mask, -torch.inf)
        expected = torch.softmax(scores, -1).nan_to_num(0.0) @ codec.decode(values).double()
        assert relative_mse(expected, out) ** 0.5 <= self.attend_error
        torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=self.attend_error, atol=1e-5)
        assert not out[0, 0].any()


def _fixed_vectors(dim: int) -> Tensor:
    """``[2, 5, d]`` from integer arithmetic alone: the same on every machine."""
    index = torch.arange(2 * 5 * dim, dtype=torch.int64)
    return ((index * 7919 + (index * index) % 1031) % 2003 - 1001).to(torch.float32).reshape(2, 5, dim) / 256


def write_golden(codec: Codec, name: str) -> str:
    """Writes a golden file; run by hand (``python -m tests.codecs.test_codecs``) when a format changes on purpose."""
    data = codec.to_bytes(codec.encode(_fixed_vectors(codec.head_dim)))
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.bin").write_bytes(data)
    return digest_bytes("golden", data)
