from typing import Any

import pytest

from fibkv.errors import ContractError, DigestMismatch
from fibkv.receipt import Receipt

from .examples import COMPRESS_RECEIPT, DIGEST, KEY_SHAPE, OTHER_DIGEST, PROFILE

OBJECTS: dict[str, Any] = {
    "shape_digest": KEY_SHAPE.digest(),
    "profile_digest": PROFILE.digest(),
    "codebook_digest": OTHER_DIGEST,
    "rotation_digest": DIGEST,
}


def changed(**fields: object) -> Receipt:
    return COMPRESS_RECEIPT.model_copy(update=fields)


def test_receipts_say_that_values_are_approximate() -> None:
    assert '"values":"approximate"' in COMPRESS_RECEIPT.to_json()
    with pytest.raises(ContractError, match=r"Receipt\.values: expected 'approximate', got 'exact'"):
        changed(values="exact")


def test_each_operation_names_its_tensors() -> None:
    assert changed(operation="decode", source_digest=None, decoded_digest=DIGEST).source_digest is None
    assert changed(operation="decode", decoded_digest=OTHER_DIGEST).source_digest == DIGEST
    assert changed(operation="eval", decoded_digest=OTHER_DIGEST).decoded_digest == OTHER_DIGEST


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operation": "repair"}, r"operation: expected 'compress', 'decode' or 'eval', got 'repair'"),
        ({"source_digest": None}, r"source_digest: expected a digest for operation compress, got None"),
        (
            {"operation": "eval", "source_digest": None, "decoded_digest": DIGEST},
            r"source_digest: expected a digest for operation eval, got None",
        ),
        ({"operation": "decode"}, r"decoded_digest: expected a digest for operation decode, got None"),
        ({"operation": "eval"}, r"decoded_digest: expected a digest for operation eval, got None"),
        ({"decoded_digest": DIGEST}, r"decoded_digest: expected nothing for operation compress, got 'blake3"),
        ({"num_pages": 3}, r"num_pages: expected 2 page digests, got 3"),
        ({"raw_vectors": 5}, r"raw_reasons: expected counts that add up to raw_vectors 5, got 4"),
        (
            {"raw_reasons": (("protected_region", 3), ("not_encodable", 1))},
            r"raw_reasons: expected reasons in order, each once, got \['protected_region', 'not_encodable'\]",
        ),
        (
            {"raw_reasons": (("protected_region", 3), ("protected_region", 1))},
            r"raw_reasons: expected reasons in order, each once",
        ),
        ({"raw_reasons": (("protected_region", 0),)}, r"raw_reasons\.0\.1: expected greater than 0, got 0"),
        ({"raw_reasons": (("Too Hot", 4),)}, r"raw_reasons\.0\.0: expected a text like .*, got 'Too Hot'"),
        ({"page_digests": (DIGEST, "blake3:")}, r"page_digests\.1: expected a text like \^blake3"),
        ({"seconds": -1.0}, r"seconds: expected greater than or equal to 0, got -1\.0"),
        ({"seconds": float("inf")}, r"seconds: expected a finite number, got inf"),
        ({"raw_nbytes": -1}, r"raw_nbytes: expected greater than or equal to 0, got -1"),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^Receipt\.{message}"):
        changed(**fields)


def test_counts_may_exceed_32_bits() -> None:
    many = 80 * 8 * 10_000_000
    assert changed(raw_vectors=many, raw_reasons=(("protected_region", many),)).raw_vectors == many


def test_receipt_agrees_with_its_own_objects() -> None:
    COMPRESS_RECEIPT.check_bindings(**OBJECTS)
    for index, digest in enumerate(COMPRESS_RECEIPT.page_digests):
        COMPRESS_RECEIPT.check_page(index, digest)


@pytest.mark.parametrize("name", ["shape_digest", "profile_digest", "codebook_digest", "rotation_digest"])
def test_other_objects_are_refused(name: str) -> None:
    other = "blake3:" + "0" * 64
    message = rf"^Receipt\.{name}: digest mismatch: expected {OBJECTS[name]}, got {other}$"
    with pytest.raises(DigestMismatch, match=message):
        COMPRESS_RECEIPT.check_bindings(**{**OBJECTS, name: other})


def test_other_pages_are_refused() -> None:
    for index, digest in enumerate(reversed(COMPRESS_RECEIPT.page_digests)):
        with pytest.raises(DigestMismatch, match=rf"^Receipt\.page_digests\[{index}\]: digest mismatch"):
            COMPRESS_RECEIPT.check_page(index, digest)
