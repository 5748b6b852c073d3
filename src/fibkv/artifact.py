"""A whole tensor as an artifact: what is archived, shipped, audited. Same policy, codecs, segments as the live cache.

Stored form: the marker line, the header's length as u64 little endian, the header as canonical JSON, and behind it
the codes of all pages in order, nothing else. Decoding is strict: everything that can be recomputed is recomputed
and compared before any code is read, and nothing is ever filled in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from fibkv import codebook
from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.coder import RoleCoder
from fibkv.contract import Contract, MarkedContract, Total
from fibkv.digest import Digest, require_digest, tensor_digest
from fibkv.errors import CodebookError, ContractError, DigestMismatch, EncodingError, PageError
from fibkv.page import Segment, SegmentHeader, segment_from_bytes, segments_digest
from fibkv.parameters import FibParameters
from fibkv.policy import Plan, Policy, Run
from fibkv.profile import Profile
from fibkv.quarantine import Quarantine, Subject
from fibkv.receipt import Receipt
from fibkv.shape import KVShape

MAGIC = b"fibkv tensor artifact 1\n"
# Bounds the memory that parsing a header may take.
MAX_HEADER_NBYTES = 1 << 30
# Largest Haar rotation that is made for a file: the work grows with the cube.
MAX_HAAR_DIM = 1024


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


def encode_tensor(shape: KVShape, profile: Profile, policy: Policy, values: Tensor) -> Artifact:
    """Compresses a tensor into pages, with a receipt.

    Args:
        shape: of the tensor.
        profile: bound to that shape.
        policy: what is compressed; it protects what the profile protects.
        values: ``[batch, layers, kv_heads, tokens, head_dim]`` in the shape's dtype, finite.

    Raises:
        ContractError: values, profile or policy that do not fit the shape; a digest that differs.
        EncodingError: values that are not finite, or cannot be encoded while the profile forbids to keep them raw.
        DecisionError: the policy asks for a calibration that is missing.
    """
    began = perf_counter()
    _check_values(shape, values)
    profile.check_shape(shape)
    coder = _bound_coder(shape, profile, policy)
    source = tensor_digest(values.detach().cpu().to(torch.float32).numpy())
    plan = coder.plan(shape)
    entries, payloads, digests = [], [], []
    for page_id, (start, stop) in enumerate(_page_spans(profile, shape)):
        segments = _seal_page(coder, plan, values, start, stop)
        entry = _entry(page_id, start, stop, source, coder, segments)
        entries.append(entry)
        payloads.append(b"".join(segment.to_bytes() for segment in segments))
        digests.append(segments_digest(entry, segments))
    counts = _Counts.of(entries)
    receipt = Receipt(
        operation="compress",
        source_digest=source,
        shape_digest=shape.digest(),
        profile_digest=coder.profile_digest,
        codebook_digest=profile.codebook_digest,
        rotation_digest=profile.rotation_digest,
        page_digests=tuple(digests),
        num_pages=len(digests),
        compressed_vectors=counts.compressed,
        raw_vectors=counts.raw,
        raw_nbytes=_raw_nbytes(shape),
        encoded_nbytes=counts.nbytes,
        raw_reasons=counts.reasons,
        seconds=perf_counter() - began,
    )
    header = ArtifactHeader(shape=shape, profile=profile, policy=policy, receipt=receipt, pages=tuple(entries))
    return Artifact(header, tuple(payloads))


def decode_tensor(artifact: Artifact, *, quarantine: Quarantine | None = None) -> tuple[Tensor, Receipt]:
    """Decodes a whole artifact.

    Args:
        artifact: what `encode_tensor` made.
        quarantine: register that a page, codebook or profile with another digest is set aside in; an artifact with a
            record there is refused until it is released.

    Returns:
        ``[batch, layers, kv_heads, tokens, head_dim]`` float32 (raw vectors are exact in it, the others approximate),
        and the receipt of the decoding.

    Raises:
        PageError, DigestMismatch, ContractError: anything that is not as its digests, counts and geometry say.
        CodebookError: its codebook is not on this machine; none is built on behalf of a file.
        DecisionError: its policy can neither compress nor keep raw.
    """
    began = perf_counter()
    name = f"of artifact {artifact.receipt.source_digest}"
    if quarantine is not None and any(record.name == name for record in quarantine.records):
        raise PageError(f"{name}: it is in quarantine")
    try:
        values = decode_slice(artifact)
    except DigestMismatch as error:
        if quarantine is not None:
            quarantine.admit(_subject(error.field), name, error.expected, str(error.actual))
        raise
    decoded = tensor_digest(values.numpy())
    receipt = artifact.receipt.model_copy(
        update={"operation": "decode", "decoded_digest": decoded, "seconds": perf_counter() - began}
    )
    return values, receipt


def decode_slice(
    artifact: Artifact,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    tokens: tuple[int, int] | None = None,
) -> Tensor:
    """Decodes a box of an artifact; pages that it does not touch are neither hashed nor read.

    Args:
        artifact: all of its header is checked in any case.
        layers: half-open range; default all.
        heads: half-open range of KV heads; default all.
        tokens: half-open range; default all.

    Returns:
        ``[batch, layers, heads, tokens, head_dim]`` float32, equal to that slice of the full decode.

    Raises:
        PageError, DigestMismatch, CodebookError, DecisionError: see `decode_tensor`.
        ContractError: likewise, or a range outside the shape.
    """
    header = artifact.header
    shape = header.shape
    header.profile.check_shape(shape)
    _require_affordable(header.profile)
    layers = _range("layers", layers, shape.layers)
    heads = _range("heads", heads, shape.kv_heads)
    tokens = _range("tokens", tokens, shape.tokens)
    coder = _bound_coder(shape, header.profile, header.policy)
    _check_header(header, coder)
    _check_payloads(artifact)
    out = torch.empty(shape.batch, layers[1] - layers[0], heads[1] - heads[0], tokens[1] - tokens[0], shape.head_dim)
    plan = coder.plan(shape)
    for entry, payload in zip(header.pages, artifact.payloads, strict=True):
        if entry.start < tokens[1] and entry.start + entry.tokens > tokens[0]:
            dense = _decode_page(coder, plan, header, entry, payload, layers)
            first, stop = max(tokens[0], entry.start), min(tokens[1], entry.start + entry.tokens)
            span = dense[:, :, heads[0] : heads[1], first - entry.start : stop - entry.start]
            out[:, :, :, first - tokens[0] : stop - tokens[0]] = span
    return out


def _subject(field: str) -> Subject:
    """What a digest that does not match belongs to, by the field that names it."""
    if "page" in field:
        return "page"
    return "codebook" if "codebook" in field else "profile"


@dataclass(frozen=True, slots=True)
class _Counts:
    compressed: int
    raw: int
    nbytes: int
    reasons: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, entries: Sequence[PageEntry]) -> _Counts:
        compressed, nbytes = 0, 0
        reasons: Counter[str] = Counter()
        for segment in (segment for entry in entries for segment in entry.segments):
            nbytes += segment.nbytes
            if segment.raw_reason is None:
                compressed += segment.num_vectors
            else:
                reasons[segment.raw_reason] += segment.num_vectors
        return cls(compressed, reasons.total(), nbytes, tuple(sorted(reasons.items())))


def _check_values(shape: KVShape, values: Tensor) -> None:
    expected = (shape.batch, shape.layers, shape.kv_heads, shape.tokens, shape.head_dim)
    if tuple(values.shape) != expected or values.dtype != TORCH_DTYPES[shape.dtype]:
        actual = f"{list(values.shape)} {values.dtype}"
        raise ContractError("encode_tensor.values", f"{list(expected)} {TORCH_DTYPES[shape.dtype]}", actual)
    if not bool(torch.isfinite(values).all()):
        raise EncodingError("encode_tensor.values: expected finite numbers, got NaN or infinity")


def _bound_coder(shape: KVShape, profile: Profile, policy: Policy) -> RoleCoder:
    coder = RoleCoder(profile, policy, shape.dtype, profile.codec.block_dim)
    codec = coder.compressing
    profile.check_binding(
        shape,
        rotation_digest=codec.rotation_digest,
        codebook_digest=codec.codebook_digest,
        vector_nbytes=codec.vector_nbytes,
    )
    return coder


def _require_affordable(profile: Profile) -> None:
    """Refuses work that a file must not cause on its word alone: hours of training, minutes of orthogonalization."""
    codec = profile.codec
    if not isinstance(codec, FibParameters):
        return
    if codec.rotation == "haar" and codec.head_dim > MAX_HAAR_DIM:
        raise PageError(
            f"artifact: expected a Haar rotation of at most {MAX_HAAR_DIM} dimensions, got {codec.head_dim}"
        )
    if not codebook.is_available(codec.block_dim, codec.codebook_size):
        raise CodebookError(
            f"codebook k={codec.block_dim}, N={codec.codebook_size}: expected a shipped or cached one to decode with, "
            "found none; fibkv.codebook.load builds it"
        )


def _raw_nbytes(shape: KVShape) -> int:
    return shape.element_count * TORCH_DTYPES[shape.dtype].itemsize


def _page_spans(profile: Profile, shape: KVShape) -> list[tuple[int, int]]:
    size = profile.geometry.tokens_per_page
    starts = (page_id * size for page_id in range(profile.geometry.num_pages(shape.tokens)))
    return [(start, min(start + size, shape.tokens)) for start in starts]


def _runs(plan: Plan, layer: int, start: int, stop: int) -> tuple[Run, ...]:
    return tuple(run.relative_to(start) for run in plan.clip(layer, start, stop))


def _seal_page(coder: RoleCoder, plan: Plan, values: Tensor, start: int, stop: int) -> list[Segment]:
    layers = [
        coder.seal(values[:, layer, :, start:stop], _runs(plan, layer, start, stop)) for layer in range(values.shape[1])
    ]
    return [segment for row in zip(*layers, strict=True) for segments in row for segment in segments]


def _entry(
    page_id: int, start: int, stop: int, source: str, coder: RoleCoder, segments: Sequence[Segment]
) -> PageEntry:
    return PageEntry(
        page_id=page_id,
        start=start,
        tokens=stop - start,
        source_digest=source,
        profile_digest=coder.profile_digest,
        segments=tuple(segment.header() for segment in segments),
    )


def _check_header(header: ArtifactHeader, coder: RoleCoder) -> None:
    """Everything about an artifact that needs no code: digests, geometry, order, rectangles, counts."""
    receipt, profile = header.receipt, header.profile
    receipt.check_bindings(
        shape_digest=header.shape.digest(),
        profile_digest=coder.profile_digest,
        codebook_digest=profile.codebook_digest,
        rotation_digest=profile.rotation_digest,
    )
    if receipt.operation != "compress":
        raise PageError(f"receipt operation: expected compress, got {receipt.operation}")
    num_pages = profile.geometry.num_pages(header.shape.tokens)
    for name, count in (("header", len(header.pages)), ("receipt", receipt.num_pages)):
        # Before any list of that length is made: the shape may lie.
        if count != num_pages:
            raise PageError(f"artifact {name}: expected {num_pages} pages by the geometry, got {count}")
    spans = _page_spans(profile, header.shape)
    plan = coder.plan(header.shape)
    for page_id, (entry, (start, stop)) in enumerate(zip(header.pages, spans, strict=True)):
        _check_entry(header, coder, plan, entry, (page_id, start, stop - start))
    counts = _Counts.of(header.pages)
    realized = (counts.compressed, counts.raw, _raw_nbytes(header.shape), counts.nbytes, counts.reasons)
    stated = (
        receipt.compressed_vectors,
        receipt.raw_vectors,
        receipt.raw_nbytes,
        receipt.encoded_nbytes,
        receipt.raw_reasons,
    )
    if realized != stated:
        raise PageError(f"receipt: expected counts, bytes and reasons {realized} of the pages, got {stated}")


def _check_payloads(artifact: Artifact) -> None:
    actual, expected = [len(payload) for payload in artifact.payloads], [page.nbytes for page in artifact.header.pages]
    if actual != expected:
        raise PageError(f"artifact payloads: expected pages of {expected} bytes, got {actual}")


def _check_entry(
    header: ArtifactHeader, coder: RoleCoder, plan: Plan, entry: PageEntry, place: tuple[int, int, int]
) -> None:
    actual = (entry.page_id, entry.start, entry.tokens)
    if actual != place:
        raise PageError(f"page {place[0]}: expected (id, start, tokens) {place} by the geometry, got {actual}")
    if header.receipt.source_digest is None:
        raise PageError("receipt: expected a source digest, got none")
    require_digest(f"page {entry.page_id} source_digest", header.receipt.source_digest, entry.source_digest)
    require_digest(f"page {entry.page_id} profile_digest", coder.profile_digest, entry.profile_digest)
    start, stop = entry.start, entry.start + entry.tokens
    least = header.shape.layers * header.shape.batch
    if len(entry.segments) < least:
        # Before any list of that length is made: the shape may lie.
        raise PageError(f"page {entry.page_id}: expected at least {least} segments, got {len(entry.segments)}")
    runs = [run for layer in range(header.shape.layers) for run in _runs(plan, layer, start, stop)]
    expected = runs * header.shape.batch
    if len(entry.segments) != len(expected):
        raise PageError(f"page {entry.page_id}: expected {len(expected)} segments, got {len(entry.segments)}")
    for index, (segment, run) in enumerate(zip(entry.segments, expected, strict=True)):
        coder.check_segment(f"page {entry.page_id} segment {index}", segment, run)


def _decode_page(
    coder: RoleCoder,
    plan: Plan,
    header: ArtifactHeader,
    entry: PageEntry,
    payload: bytes,
    layers: tuple[int, int],
) -> Tensor:
    """Checks one page against its digest and decodes some of its layers: ``[batch, layers, heads, tokens, d]``."""
    shape = header.shape
    start, stop = entry.start, entry.start + entry.tokens
    runs = [(layer, run) for layer in range(shape.layers) for run in _runs(plan, layer, start, stop)]
    placed = [(row, layer, run) for row in range(shape.batch) for layer, run in runs]
    view, segments, offset = memoryview(payload), [], 0
    for stored, (_, _, run) in zip(entry.segments, placed, strict=True):
        codec = coder.codec_of_segment(stored, run.decision)
        segments.append(segment_from_bytes(stored, run.decision, codec, view[offset : offset + stored.nbytes]))
        offset += stored.nbytes
    header.receipt.check_page(entry.page_id, segments_digest(entry, segments))
    dense = torch.empty(shape.batch, layers[1] - layers[0], shape.kv_heads, entry.tokens, shape.head_dim)
    for segment, (row, layer, _) in zip(segments, placed, strict=True):
        if layers[0] <= layer < layers[1]:
            (h0, h1), (t0, t1) = segment.heads, segment.tokens
            segment.codec.decode(segment.codes, out=dense[row, layer - layers[0], h0:h1, t0:t1])
    return dense


def _range(name: str, given: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if given is None:
        return 0, count
    if not 0 <= given[0] < given[1] <= count:
        raise ContractError(f"decode_slice.{name}", f"0 <= start < stop <= {count}", given)
    return given
