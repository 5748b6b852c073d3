"""Decoding artifacts, strictly: everything that can be recomputed is recomputed and compared before a code is read.

Nothing is ever filled in, and nothing of a size or cost that only the file claims is made before it is checked.
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from fibkv import codebook
from fibkv.artifact import Artifact, ArtifactHeader, PageEntry, VectorCounts, page_runs, page_spans, raw_nbytes
from fibkv.coder import RoleCoder, bound_coder
from fibkv.digest import require_digest, tensor_digest
from fibkv.errors import CodebookError, ContractError, DigestMismatch, PageError
from fibkv.page import segment_from_bytes, segments_digest
from fibkv.parameters import FibParameters, TrellisParameters
from fibkv.policy import Plan
from fibkv.profile import Profile
from fibkv.quarantine import Quarantine, Subject
from fibkv.receipt import Receipt

# Largest Haar rotation that is made for a file: the work grows with the cube.
MAX_HAAR_DIM = 1024


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
    coder = bound_coder(shape, header.profile, header.policy)
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


def _require_affordable(profile: Profile) -> None:
    """Refuses work that a file must not cause on its word alone: hours of training, minutes of orthogonalization."""
    codec = profile.codec
    if not isinstance(codec, FibParameters | TrellisParameters):
        return
    if codec.rotation == "haar" and codec.head_dim > MAX_HAAR_DIM:
        raise PageError(
            f"artifact: expected a Haar rotation of at most {MAX_HAAR_DIM} dimensions, got {codec.head_dim}"
        )
    if isinstance(codec, FibParameters) and not codebook.is_available(codec.block_dim, codec.codebook_size):
        raise CodebookError(
            f"codebook k={codec.block_dim}, N={codec.codebook_size}: expected a shipped or cached one to decode with, "
            "found none; fibkv.codebook.load builds it"
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
    spans = page_spans(profile, header.shape)
    plan = coder.plan(header.shape)
    for page_id, (entry, (start, stop)) in enumerate(zip(header.pages, spans, strict=True)):
        _check_entry(header, coder, plan, entry, (page_id, start, stop - start))
    counts = VectorCounts.of(header.pages)
    realized = (counts.compressed, counts.raw, raw_nbytes(header.shape), counts.nbytes, counts.reasons)
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
    runs = [run for layer in range(header.shape.layers) for run in page_runs(plan, layer, start, stop)]
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
    runs = [(layer, run) for layer in range(shape.layers) for run in page_runs(plan, layer, start, stop)]
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
            (h0, h1), (t0, t1) = segment.form.heads, segment.form.tokens
            segment.codec.decode(segment.codes, out=dense[row, layer - layers[0], h0:h1, t0:t1])
    return dense


def _range(name: str, given: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if given is None:
        return 0, count
    if not 0 <= given[0] < given[1] <= count:
        raise ContractError(f"decode_slice.{name}", f"0 <= start < stop <= {count}", given)
    return given
