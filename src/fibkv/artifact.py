"""The stored form of a whole tensor in compressed pages: what is archived, shipped, audited.

The marker line, the header's length as u64 little endian, the header as canonical JSON, and behind it the codes of
all pages in order, nothing else. `fibkv.artifact_encode` makes artifacts and `fibkv.artifact_decode` reads them, with
the same policy, codecs and segments as the live cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.contract import Contract, MarkedContract, Total
from fibkv.digest import Digest
from fibkv.errors import PageError
from fibkv.page_form import SegmentHeader
from fibkv.policy import Plan, Policy, Run
from fibkv.profile import Profile
from fibkv.receipt import Receipt
from fibkv.shape import KVShape

MAGIC = b"fibkv tensor artifact 1\n"
# Bounds the memory that parsing a header may take.
MAX_HEADER_NBYTES = 1 << 30


class PageEntry(Contract):
    """One page of a tensor: a token span of all layers, heads and batch rows.

    Attributes:
        page_id: its index.
        start: first token.
        tokens: number of tokens.
        source_digest: of the tensor that it was made from.
        profile_digest: of the bound profile.
        segments: for batch row 0 layer by layer, then for row 1, and so on.
    """

    page_id: Total
    start: Total
    tokens: Total
    source_digest: Digest
    profile_digest: Digest
    segments: tuple[SegmentHeader, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the page's codes."""
        return sum(segment.nbytes for segment in self.segments)


class ArtifactHeader(MarkedContract):
    """Everything of an artifact except the codes."""

    schema_version: Literal["fibkv_tensor_artifact_v1"] = "fibkv_tensor_artifact_v1"
    shape: KVShape
    profile: Profile
    policy: Policy
    receipt: Receipt
    pages: tuple[PageEntry, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A tensor in compressed pages: the header, and the codes of each page."""

    header: ArtifactHeader
    payloads: tuple[bytes, ...]

    @property
    def receipt(self) -> Receipt:
        """Of the compression."""
        return self.header.receipt

    def to_bytes(self) -> bytes:
        """The stored form. The receipt in it says how long the encoding took; all else depends on the tensor alone."""
        text = self.header.to_json().encode()
        return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *self.payloads])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Artifact:
        """Reads the stored form; nothing is allocated beyond the size of ``data``.

        Raises:
            PageError: a wrong marker, a truncated file or trailing bytes.
            ContractError: a header that is not valid.
        """
        view = memoryview(data)
        if bytes(view[: len(MAGIC)]) != MAGIC:
            raise PageError(f"artifact marker: expected {MAGIC!r}, got {bytes(view[: len(MAGIC)])!r}")
        start = len(MAGIC) + 8
        length = int.from_bytes(view[len(MAGIC) : start], "little")
        if len(view) < start or length > min(MAX_HEADER_NBYTES, len(view) - start):
            raise PageError(
                f"artifact: truncated, the header of {length} bytes ends behind the {len(view)} bytes given"
            )
        header = ArtifactHeader.from_json(bytes(view[start : start + length]))
        if header.to_json().encode() != view[start : start + length]:
            raise PageError("artifact header: expected canonical JSON")
        sizes = [page.nbytes for page in header.pages]
        expected = start + length + sum(sizes)
        if len(view) != expected:
            what = "truncated" if len(view) < expected else "trailing bytes"
            raise PageError(f"artifact: {what}, expected {expected} bytes, got {len(view)}")
        offsets = [start + length]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        return cls(header, tuple(bytes(view[a:b]) for a, b in pairwise(offsets)))


@dataclass(frozen=True, slots=True)
class VectorCounts:
    """What the segments of pages add up to: vectors, bytes, and raw vectors by reason."""

    compressed: int
    raw: int
    nbytes: int
    reasons: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, entries: Sequence[PageEntry]) -> VectorCounts:
        """Counts over the segments of some pages."""
        compressed, nbytes = 0, 0
        reasons: Counter[str] = Counter()
        for segment in (segment for entry in entries for segment in entry.segments):
            nbytes += segment.nbytes
            if segment.raw_reason is None:
                compressed += segment.num_vectors
            else:
                reasons[segment.raw_reason] += segment.num_vectors
        return cls(compressed, reasons.total(), nbytes, tuple(sorted(reasons.items())))


def raw_nbytes(shape: KVShape) -> int:
    """Bytes of the uncompressed tensor."""
    return shape.element_count * TORCH_DTYPES[shape.dtype].itemsize


def page_spans(profile: Profile, shape: KVShape) -> list[tuple[int, int]]:
    """Token spans of the pages of a tensor: page i starts at i * tokens_per_page, the last one holds the rest."""
    size = profile.geometry.tokens_per_page
    starts = (page_id * size for page_id in range(profile.geometry.num_pages(shape.tokens)))
    return [(start, min(start + size, shape.tokens)) for start in starts]


def page_runs(plan: Plan, layer: int, start: int, stop: int) -> tuple[Run, ...]:
    """The policy's runs for one layer of a page, with token ranges relative to it."""
    return tuple(run.relative_to(start) for run in plan.clip(layer, start, stop))
