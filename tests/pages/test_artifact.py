"""Whole tensors as artifacts: exact where raw, strict in every byte, sliceable without touching other pages."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fibkv.artifact import Artifact
from fibkv.artifact_decode import decode_slice, decode_tensor
from fibkv.artifact_encode import encode_tensor
from fibkv.coder import bind_coder, bind_profile
from fibkv.errors import ContractError, DecisionError, DigestMismatch, EncodingError, FibkvError, PageError
from fibkv.parameters import FibParameters, named_parameters
from fibkv.policy import Policy, decide
from fibkv.profile import Profile
from fibkv.quarantine import Quarantine
from fibkv.regions import FallbackSettings, ProtectedRegions
from fibkv.shape import KVShape
from tests.pages.helpers import DIM, HEADS, gaussian, protecting, shape_of

TOKENS = 37


def make(
    role: str = "key", name: str = "fib4", policy: Policy | None = None, **fields: object
) -> tuple[KVShape, Profile, Policy, Tensor]:
    shape = shape_of(role, tokens=TOKENS, batch=2, layers=3, **fields)
    policy = policy or protecting(first_tokens_raw=3, last_tokens_raw=2, raw_layers=(1,), raw_heads=(0,))
    profile = bind_coder(
        shape,
        named_parameters(name, DIM, shape.dtype),
        policy,
        profile_id="test",
        tokens_per_page=16,
        raw_dtype=shape.dtype,
    ).profile
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[shape.dtype]
    values = gaussian(2, 3, HEADS, TOKENS, DIM).to(dtype)
    return shape, profile, policy, values


def artifact(**fields: object) -> Artifact:
    return encode_tensor(*make(**fields))


def test_bind_profile_is_all_that_a_user_needs() -> None:
    shape = shape_of("value", tokens=TOKENS)
    policy = Policy.role_aware_baseline()
    profile = bind_profile(shape, "fib2", policy, profile_id="archive")
    values = gaussian(1, 3, HEADS, TOKENS, DIM)
    decoded, receipt = decode_tensor(encode_tensor(shape, profile, policy, values))
    assert profile.geometry.tokens_per_page == TOKENS
    assert receipt.raw_vectors == 3 * HEADS
    assert 0.05 < (decoded - values).square().mean() < 0.15


def smallest() -> Artifact:
    """One vector of each of two heads."""
    shape = shape_of("key", tokens=1, layers=1)
    parameters = named_parameters("fib4", DIM, "f32")
    coder = bind_coder(shape, parameters, Policy.per_token(), profile_id="test", tokens_per_page=1, raw_dtype="f32")
    return encode_tensor(shape, coder.profile, coder.policy, gaussian(1, 1, HEADS, 1, DIM))


@pytest.fixture(name="made", scope="module")
def _made() -> Artifact:
    return artifact()


@pytest.fixture(name="data", scope="module")
def _data() -> bytes:
    return artifact(policy=Policy.per_token()).to_bytes()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["fib4", "int8", "fp8"])
def test_round_trip(name: str, dtype: str) -> None:
    shape, profile, policy, values = make(name=name, dtype=dtype)
    made = encode_tensor(shape, profile, policy, values)
    decoded, receipt = decode_tensor(Artifact.from_bytes(made.to_bytes()))
    raw = torch.zeros(shape.layers, shape.kv_heads, shape.tokens, dtype=torch.bool)
    for layer in range(shape.layers):
        for head in range(shape.kv_heads):
            for token in range(shape.tokens):
                decision = decide(policy, shape, layer, head, token, has_calibration=False)
                raw[layer, head, token] = decision.action == "keep_raw"
    exact = values.float()
    assert torch.equal(decoded[:, raw], exact[:, raw])
    error = (decoded - exact)[:, ~raw].square().mean() / exact[:, ~raw].square().mean()
    assert 0 < error < {"fib4": 0.01, "int8": 1e-4, "fp8": 1e-3}[name]
    assert (receipt.operation, receipt.values) == ("decode", "approximate")
    assert receipt.raw_vectors == 2 * int(raw.sum())
    assert receipt.raw_reasons == (("protected_region", receipt.raw_vectors),)
    assert receipt.compressed_vectors + receipt.raw_vectors == shape.vector_count
    assert receipt.encoded_nbytes == sum(map(len, made.payloads))
    assert receipt.raw_nbytes == values.numel() * values.element_size()
    assert made.receipt.source_digest == receipt.source_digest


@pytest.mark.parametrize("strategy", ["fib_quant_per_channel", "role_aware_kivi_style_baseline", "raw"])
@pytest.mark.parametrize("role", ["key", "value"])
def test_strategies(strategy: str, role: str) -> None:
    policy = Policy(strategy=strategy, protected=ProtectedRegions(), require_calibration=False, allow_raw_fallback=True)
    made = artifact(role=role, name="raw" if strategy == "raw" else "fib4", policy=policy)
    axes = {segment.axis for page in made.header.pages for segment in page.segments}
    per_channel = strategy == "fib_quant_per_channel" or (strategy.startswith("role_aware") and role == "key")
    assert axes == {"raw" if strategy == "raw" else "per_channel" if per_channel else "per_token"}
    assert made.receipt.raw_vectors == (0 if strategy != "raw" else made.header.shape.vector_count)
    decoded, _ = decode_tensor(made)
    assert (decoded - make()[3]).square().mean() < (1e-12 if strategy == "raw" else 0.01)


def test_slices_equal_the_full_decode_and_touch_no_other_page() -> None:
    made = artifact()
    full, _ = decode_tensor(made)
    middle = decode_slice(made, layers=(1, 3), heads=(1, 2), tokens=(14, 30))
    assert torch.equal(middle, full[:, 1:3, 1:2, 14:30])
    # The third page is not read: nothing is said of its damage.
    broken = Artifact(made.header, (*made.payloads[:2], bytes(len(made.payloads[2]))))
    assert torch.equal(decode_slice(broken, tokens=(0, 32)), full[:, :, :, :32])
    with pytest.raises(PageError, match=r"codes field 'norm_range'"):
        decode_slice(broken, tokens=(0, 33))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"layers": (0, 4)}, r"decode_slice.layers: expected 0 <= start < stop <= 3, got \(0, 4\)"),
        ({"heads": (1, 1)}, "decode_slice.heads"),
        ({"tokens": (-1, 3)}, "decode_slice.tokens"),
    ],
)
def test_slices_outside_the_shape_are_refused(given: dict[str, tuple[int, int]], match: str) -> None:
    with pytest.raises(ContractError, match=match):
        decode_slice(artifact(), **given)


def test_batch_encoding_equals_one_by_one() -> None:
    shape, _, policy, values = make()
    together = encode_tensor(*make())
    for row in range(2):
        single = shape.model_copy(update={"batch": 1})
        profile = bind_coder(
            single,
            named_parameters("fib4", DIM, "f32"),
            policy,
            profile_id="test",
            tokens_per_page=16,
            raw_dtype="f32",
        ).profile
        alone = encode_tensor(single, profile, policy, values[row : row + 1])
        for page, whole in zip(alone.payloads, together.payloads, strict=True):
            half = len(whole) // 2
            assert page == whole[row * half : (row + 1) * half]


def test_encoding_is_deterministic() -> None:
    first, second = artifact(), artifact()
    assert first.payloads == second.payloads
    assert first.receipt.page_digests == second.receipt.page_digests


class TestEncodeRefusals:
    def refuse(self, match: str, error: type[Exception], change: Callable[[list[object]], None]) -> None:
        arguments: list[object] = list(make())
        change(arguments)
        with pytest.raises(error, match=match):
            encode_tensor(*arguments)

    def test_shape_of_values(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[3] = arguments[3][:1]

        self.refuse(r"encode_tensor.values: expected \[2, 3, 2, 37, 64\] torch.float32", ContractError, change)

    def test_dtype_of_values(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[3] = arguments[3].half()

        self.refuse("got .*torch.float16", ContractError, change)

    def test_non_finite(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[3][0, 0, 0, 5, 0] = torch.nan

        self.refuse("finite numbers, got NaN or infinity", EncodingError, change)

    def test_foreign_profile(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[0] = arguments[0].model_copy(update={"tokens": 38})
            arguments[3] = torch.cat([arguments[3], arguments[3][:, :, :, :1]], 3)

        self.refuse("Profile.shape_digest: digest mismatch", DigestMismatch, change)

    def test_policy_that_protects_otherwise(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[2] = Policy.per_token()

        self.refuse("Profile.protected: expected", ContractError, change)

    def test_policy_on_another_axis(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[2] = arguments[2].model_copy(update={"strategy": "fib_quant_per_channel"})

        self.refuse("Profile.axis: expected per_channel", ContractError, change)

    def test_foreign_codebook(self) -> None:
        def change(arguments: list[object]) -> None:
            arguments[1] = arguments[1].model_copy(update={"codebook_digest": "blake3:" + "0" * 64})

        self.refuse("Profile.codebook_digest: digest mismatch: expected blake3:0000", DigestMismatch, change)

    def test_missing_calibration(self) -> None:
        def change(arguments: list[object]) -> None:
            update = {"require_calibration": True, "allow_raw_fallback": False}
            arguments[2] = arguments[2].model_copy(update=update)

        self.refuse("need_calibration", DecisionError, change)


def test_what_cannot_be_encoded_falls_back_or_fails_closed() -> None:
    shape, profile, policy, values = make(policy=Policy.per_token())
    values[0, 1, 0, 20] = 3e38
    made = encode_tensor(shape, profile, policy, values)
    assert made.receipt.raw_reasons == (("not_encodable", HEADS * 16),)
    decoded, _ = decode_tensor(Artifact.from_bytes(made.to_bytes()))
    assert torch.equal(decoded[0, 1, :, 16:32], values[0, 1, :, 16:32])
    closed = profile.model_copy(update={"fallback": FallbackSettings(mode="fail_closed")})
    with pytest.raises(EncodingError, match="raw fallback is not allowed"):
        encode_tensor(shape, closed, policy, values)


class TestStrictDecoding:
    """Every refusal of the contract, each by its own message."""

    def refuse(self, made: Artifact, match: str, **header: object) -> None:
        changed = made.header.model_copy(update=header)
        with pytest.raises(FibkvError, match=match):
            decode_tensor(Artifact(changed, made.payloads))

    def receipt(self, made: Artifact, **fields: object) -> dict[str, object]:
        return {"receipt": made.receipt.model_copy(update=fields)}

    @pytest.mark.parametrize("field", ["shape_digest", "profile_digest", "codebook_digest", "rotation_digest"])
    def test_receipt_digests(self, made: Artifact, field: str) -> None:
        zero = "blake3:" + "0" * 64
        self.refuse(made, f"Receipt.{field}: digest mismatch: expected {zero}", **self.receipt(made, **{field: zero}))

    def test_page_counts(self, made: Artifact) -> None:
        self.refuse(made, "artifact header: expected 3 pages by the geometry, got 2", pages=made.header.pages[:2])
        fewer = self.receipt(made, page_digests=made.receipt.page_digests[:2], num_pages=2)
        self.refuse(made, "artifact receipt: expected 3 pages by the geometry, got 2", **fewer)

    def test_page_order(self, made: Artifact) -> None:
        a, b, c = made.header.pages
        self.refuse(made, r"page 0: expected \(id, start, tokens\) \(0, 0, 16\).*got \(1, 16, 16\)", pages=(b, a, c))
        self.refuse(made, r"page 1: .*got \(0, 0, 16\)", pages=(a, a, c))
        wrong = a.model_copy(update={"tokens": 15})
        self.refuse(made, r"page 0: .*got \(0, 0, 15\)", pages=(wrong, b, c))

    def test_page_source_and_profile(self, made: Artifact) -> None:
        first, *rest = made.header.pages
        zero = "blake3:" + "0" * 64
        for field in ("source_digest", "profile_digest"):
            wrong = first.model_copy(update={field: zero})
            self.refuse(made, f"page 0 {field}: digest mismatch", pages=(wrong, *rest))

    def test_page_digest_of_the_receipt(self, made: Artifact) -> None:
        digests = (made.receipt.page_digests[1], *made.receipt.page_digests[1:])
        self.refuse(made, r"Receipt.page_digests\[0\]: digest mismatch", **self.receipt(made, page_digests=digests))

    def test_page_bytes(self, made: Artifact) -> None:
        for page in range(3):
            damaged = bytearray(made.payloads[page])
            damaged[len(damaged) // 2] ^= 1
            payloads = list(made.payloads)
            payloads[page] = bytes(damaged)
            with pytest.raises(FibkvError, match=rf"Receipt.page_digests\[{page}\]: digest mismatch|codes field"):
                decode_tensor(Artifact(made.header, tuple(payloads)))

    def test_counts_and_reasons(self, made: Artifact) -> None:
        count = made.receipt.raw_vectors
        for fields in (
            {"compressed_vectors": made.receipt.compressed_vectors + 1},
            {"raw_nbytes": 1},
            {"encoded_nbytes": made.receipt.encoded_nbytes + 1},
            {"raw_reasons": (("raw_strategy", count),)},
        ):
            self.refuse(made, "receipt: expected counts, bytes and reasons", **self.receipt(made, **fields))

    def test_segments(self, made: Artifact) -> None:
        first, *rest = made.header.pages
        index = next(i for i, segment in enumerate(first.segments) if segment.action == "compress")
        segment = first.segments[index]
        for update in (
            {"heads": (0, 9)},
            {"tokens": (0, 99)},
            {"codec": "raw"},
            {"reasons": ("raw_strategy",)},
            {"action": "quarantine"},
        ):
            segments = list(first.segments)
            segments[index] = segment.model_copy(update=update)
            wrong = first.model_copy(update={"segments": tuple(segments)})
            self.refuse(made, f"page 0 segment {index}: expected", pages=(wrong, *rest))
        short = first.model_copy(update={"segments": first.segments[1:]})
        self.refuse(made, "page 0: expected .* segments, got", pages=(short, *rest))

    def test_operation_of_the_receipt(self, made: Artifact) -> None:
        fields = {"operation": "eval", "decoded_digest": made.receipt.source_digest}
        self.refuse(made, "receipt operation: expected compress, got eval", **self.receipt(made, **fields))

    def test_missing_payloads(self, made: Artifact) -> None:
        with pytest.raises(PageError, match=r"artifact payloads: expected pages of \[.*\] bytes, got \[\d+, \d+\]"):
            decode_tensor(Artifact(made.header, made.payloads[:2]))

    def test_a_lying_shape_costs_nothing(self, made: Artifact) -> None:
        """2^31 layers with consistent digests: refused before anything of that length is made."""
        shape = made.header.shape.model_copy(update={"layers": 2**31, "batch": 1})
        profile = made.header.profile.model_copy(update={"shape_digest": shape.digest()})
        receipt = made.receipt.model_copy(update={"shape_digest": shape.digest(), "profile_digest": profile.digest()})
        pages = tuple(page.model_copy(update={"profile_digest": profile.digest()}) for page in made.header.pages)
        header = {"shape": shape, "profile": profile, "receipt": receipt, "pages": pages}
        self.refuse(made, "page 0: expected at least 2147483648 segments", **header)

    def test_a_codebook_is_never_built_for_a_file(
        self, made: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("fibkv.codebook._build", lambda *arguments: pytest.fail("a codebook was built"))
        codec = FibParameters.of(DIM, 2, 4096)
        profile = made.header.profile.model_copy(update={"codec": codec})
        self.refuse(made, "Profile.codec_digest: digest mismatch", profile=profile)
        profile = profile.model_copy(update={"codec_digest": codec.digest()})
        self.refuse(made, "codebook k=2, N=4096: expected a shipped or cached one", profile=profile)

    def test_a_large_haar_rotation_is_never_made_for_a_file(self, made: Artifact) -> None:
        shape = made.header.shape.model_copy(update={"head_dim": 4096})
        codec = FibParameters.of(4096, 2, 256, rotation="haar")
        digests = {"shape_digest": shape.digest(), "codec_digest": codec.digest()}
        profile = made.header.profile.model_copy(update={"codec": codec, **digests})
        self.refuse(made, "Haar rotation of at most 1024 dimensions, got 4096", shape=shape, profile=profile)

    def test_what_does_not_match_is_quarantined(self, made: Artifact) -> None:
        zero = "blake3:" + "0" * 64
        wrong = {
            "page": self.receipt(made, page_digests=(zero, *made.receipt.page_digests[1:])),
            "codebook": {"profile": made.header.profile.model_copy(update={"codebook_digest": zero})},
            "profile": self.receipt(made, profile_digest=zero),
        }
        for subject, header in wrong.items():
            register = Quarantine()
            damaged = Artifact(made.header.model_copy(update=header), made.payloads)
            with pytest.raises(DigestMismatch):
                decode_tensor(damaged, quarantine=register)
            (record,) = register.records
            assert (record.subject, record.expected != record.actual) == (subject, True)
            assert f"{subject} of artifact {made.receipt.source_digest}: digest mismatch" in record.reason
            with pytest.raises(PageError, match="is in quarantine"):
                decode_tensor(made, quarantine=register)
            register.release(record.subject, record.name)
            decode_tensor(made, quarantine=register)


class TestStoredForm:
    def test_every_truncation_is_refused(self) -> None:
        data = smallest().to_bytes()
        for length in range(len(data)):
            with pytest.raises(PageError, match=r"artifact marker: expected|truncated"):
                Artifact.from_bytes(data[:length])

    def test_trailing_bytes_are_refused(self, data: bytes) -> None:
        with pytest.raises(PageError, match=r"trailing bytes, expected .* bytes, got"):
            Artifact.from_bytes(data + b"\0")

    def test_wrong_marker_is_refused(self, data: bytes) -> None:
        with pytest.raises(PageError, match="artifact marker: expected b'fibkv tensor artifact 1"):
            Artifact.from_bytes(b"X" + data[1:])

    def test_a_header_length_beyond_the_file_is_refused(self, data: bytes) -> None:
        lying = data[:24] + (1 << 62).to_bytes(8, "little") + data[32:]
        with pytest.raises(PageError, match="truncated, the header of"):
            Artifact.from_bytes(lying)

    def test_unknown_fields_and_other_spellings_are_refused(self, data: bytes) -> None:
        length = int.from_bytes(data[24:32], "little")
        text = data[32 : 32 + length]
        for changed, match in (
            (text.replace(b'{"schema_version"', b'{"more":1,"schema_version"', 1), "only the fields"),
            (text + b" ", "canonical JSON"),
        ):
            forged = data[:24] + len(changed).to_bytes(8, "little") + changed + data[32 + length :]
            with pytest.raises(FibkvError, match=match):
                Artifact.from_bytes(forged)

    def test_random_bit_flips_are_never_decoded(self, data: bytes) -> None:
        rng = random.Random(1)
        for _ in range(150):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            with pytest.raises(FibkvError):
                decode_tensor(Artifact.from_bytes(bytes(damaged)))
