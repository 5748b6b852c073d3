import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.digest import canonical_json, digest, digest_bytes, require_digest, tensor_digest
from fibkv.errors import ContractError, DigestMismatch, EncodingError

from .examples import DIGEST, KEY_SHAPE, OTHER_DIGEST


def test_tensor_check_value() -> None:
    expected = "blake3:f280416feb4a47c30cf0c72e5c29d066a00803831dfc5ecdc03725b960ff7085"
    values = np.array([0.0, 1.0, -2.5, 0.1], dtype=np.float32)
    assert tensor_digest(values) == expected
    assert tensor_digest(values.astype(">f4")) == expected
    assert tensor_digest(values.reshape(1, 2, 2)) == expected


def test_digest_is_blake3_of_domain_zero_byte_and_json() -> None:
    payload = b'some_domain\0{"b":1,"a":[2.0,null,true,"\xc3\xa9"]}'
    assert (
        digest("some_domain", {"b": 1, "a": [2.0, None, True, "é"]}) == f"blake3:{blake3.blake3(payload).hexdigest()}"
    )
    assert digest_bytes("some_domain", payload[12:]) == f"blake3:{blake3.blake3(payload).hexdigest()}"


def test_domain_separates() -> None:
    assert digest("a", {}) != digest("b", {})
    assert digest_bytes("a", b"bc") != digest_bytes("ab", b"c")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2.0"), (0.1, "0.1"), (1 / 3, "0.3333333333333333"), (-0.0, "-0.0"), (1e16, "1e+16"), (2, "2")],
)
def test_numbers_in_json(value: float, text: str) -> None:
    assert canonical_json({"x": value}) == f'{{"x":{text}}}'


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip(value: float) -> None:
    assert repr(float(canonical_json(value))) == repr(value)


def test_contracts_inside_mappings() -> None:
    assert canonical_json({"shape": KEY_SHAPE}) == f'{{"shape":{KEY_SHAPE.to_json()}}}'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "got 'Out of range float values"),
        ([float("inf")], "got 'Out of range float values"),
        ({"x": "\ud800"}, "surrogates not allowed"),
        ({"x": {1, 2}}, "got 'set has no JSON form'"),
        ({"x": np.zeros(2)}, "got 'ndarray has no JSON form'"),
    ],
)
def test_values_without_canonical_json_are_refused(value: object, message: str) -> None:
    with pytest.raises(ContractError, match=f"canonical_json: expected finite, JSON-representable values, .*{message}"):
        canonical_json(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("domain", ["", "a\0b"])
def test_ambiguous_domains_are_refused(domain: str) -> None:
    with pytest.raises(ContractError, match=r"digest\.domain: expected a non-empty text without zero bytes"):
        digest(domain, {})


@pytest.mark.parametrize("nbytes", [1 << 10, 1 << 20])
def test_a_digest_does_not_depend_on_how_the_bytes_are_cut(nbytes: int) -> None:
    data = bytes(range(256)) * (nbytes // 256)
    pieces = [data[start : start + 1000] for start in range(0, nbytes, 1000)]
    assert digest_bytes("d", *pieces) == digest_bytes("d", data)
    assert digest_bytes("d", data) == f"blake3:{blake3.blake3(b'd' + bytes(1) + data).hexdigest()}"


def test_chunks_count_as_one() -> None:
    whole = digest_bytes("d", b"abcdef")
    assert digest_bytes("d", b"ab", memoryview(b"cd"), np.frombuffer(b"ef", dtype=np.uint8)) == whole
    assert digest_bytes("d", np.frombuffer(b"abcdef", dtype="<u2"), np.empty((0, 3))) == whole


def test_arrays_count_in_c_order() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert digest_bytes("d", array.T) == digest_bytes("d", bytes([0, 3, 1, 4, 2, 5]))
    assert digest_bytes("d", array[:, ::2]) == digest_bytes("d", bytes([0, 2, 3, 5]))


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(
        ContractError, match=r"digest\.chunk: expected an array of numbers, got 'an array of dtype object"
    ):
        digest_bytes("d", np.array([object()]))


def test_tensor_digest_knows_size_and_order() -> None:
    values = np.arange(4, dtype=np.float32)
    assert tensor_digest(values) != tensor_digest(values[::-1])
    assert tensor_digest(values) != tensor_digest(values[:3])
    assert tensor_digest(np.empty(0, np.float32)) == digest_bytes("fib_quant_kv_tensor_f32_v1", bytes(8))


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False)))
def test_half_precision_values_have_the_digest_of_their_singles(values: list[float]) -> None:
    halves = np.array(values, dtype=np.float16)
    assert tensor_digest(halves) == tensor_digest(halves.astype(np.float32)) == tensor_digest(halves.astype(np.float64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_as_f32_are_refused_by_index(bad: float) -> None:
    with pytest.raises(EncodingError, match=r"expected finite f32 values, got .* at flat index 3$"):
        tensor_digest(np.array([[0.0, 1.0], [2.0, bad]]))


def test_integers_are_no_tensor() -> None:
    with pytest.raises(EncodingError, match="expected floating-point values, got dtype int64"):
        tensor_digest(np.arange(3, dtype=np.int64))  # type: ignore[arg-type]


def test_require_digest() -> None:
    require_digest("Thing.digest", DIGEST, DIGEST)
    message = f"^Thing.digest: digest mismatch: expected {DIGEST}, got {OTHER_DIGEST}$"
    with pytest.raises(DigestMismatch, match=message):
        require_digest("Thing.digest", DIGEST, OTHER_DIGEST)
