"""Receipts: what an operation did to a tensor, in counts, bytes and digests."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from fibkv.contract import MarkedContract, Total
from fibkv.digest import Digest, DigestOrNone, require_digest
from fibkv.errors import ContractError

Operation = Literal["compress", "decode", "eval"]
_Positive = Annotated[int, Field(gt=0, lt=2**63)]
ReasonName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Receipt(MarkedContract):
    """One operation. Compress names the source tensor, decode the decoded one, eval both.

    ``values`` says of every decoded value that it is approximate. ``raw_nbytes`` is what all vectors take
    uncompressed in the shape's dtype, ``encoded_nbytes`` what they take as stored, raw ones included.
    ``raw_reasons`` counts the raw vectors by reason, sorted by reason.

    Raises:
        ContractError: on construction; a digest is missing, or counts contradict each other.
    """

    schema_version: Literal["fibkv_receipt_v1"] = "fibkv_receipt_v1"
    operation: Operation
    source_digest: Digest | None = None
    decoded_digest: Digest | None = None
    shape_digest: Digest
    profile_digest: Digest
    codebook_digest: DigestOrNone
    rotation_digest: DigestOrNone
    page_digests: tuple[Digest, ...]
    num_pages: Total
    compressed_vectors: Total
    raw_vectors: Total
    raw_nbytes: Total
    encoded_nbytes: Total
    raw_reasons: tuple[tuple[ReasonName, _Positive], ...]
    values: Literal["approximate"] = "approximate"
    seconds: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operation != "decode" and self.source_digest is None:
            raise ContractError("Receipt.source_digest", f"a digest for operation {self.operation}", None)
        if self.operation != "compress" and self.decoded_digest is None:
            raise ContractError("Receipt.decoded_digest", f"a digest for operation {self.operation}", None)
        if self.operation == "compress" and self.decoded_digest is not None:
            raise ContractError("Receipt.decoded_digest", "nothing for operation compress", self.decoded_digest)
        if self.num_pages != len(self.page_digests):
            raise ContractError("Receipt.num_pages", f"{len(self.page_digests)} page digests", self.num_pages)
        reasons = [reason for reason, _ in self.raw_reasons]
        if reasons != sorted(set(reasons)):
            raise ContractError("Receipt.raw_reasons", "reasons in order, each once", reasons)
        counted = sum(count for _, count in self.raw_reasons)
        if counted != self.raw_vectors:
            raise ContractError("Receipt.raw_reasons", f"counts that add up to raw_vectors {self.raw_vectors}", counted)
        return self

    def check_bindings(
        self, *, shape_digest: str, profile_digest: str, codebook_digest: str, rotation_digest: str
    ) -> None:
        """Check that the receipt speaks of these objects.

        Args:
            shape_digest: recomputed from the shape.
            profile_digest: recomputed from the profile.
            codebook_digest: of the codebook in use, or ``none:<codec>``.
            rotation_digest: of the rotation in use, or ``none:<codec>``.

        Raises:
            DigestMismatch: a digest differs.
        """
        require_digest("Receipt.shape_digest", self.shape_digest, shape_digest)
        require_digest("Receipt.profile_digest", self.profile_digest, profile_digest)
        require_digest("Receipt.codebook_digest", self.codebook_digest, codebook_digest)
        require_digest("Receipt.rotation_digest", self.rotation_digest, rotation_digest)

    def check_page(self, index: int, page_digest: str) -> None:
        """Check that the receipt speaks of a page, by its recomputed digest.

        Raises:
            DigestMismatch: the digest differs.
        """
        require_digest(f"Receipt.page_digests[{index}]", self.page_digests[index], page_digest)
