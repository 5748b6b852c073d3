"""Compressing a whole tensor into an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from fibkv.artifact import Artifact, ArtifactHeader, PageEntry, VectorCounts, page_runs, page_spans, raw_nbytes
from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.coder import RoleCoder, bound_coder
from fibkv.digest import tensor_digest
from fibkv.errors import ContractError, EncodingError
from fibkv.page import Segment, segments_digest
from fibkv.policy import Plan, Policy
from fibkv.profile import Profile
from fibkv.receipt import Receipt
from fibkv.shape import KVShape


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
    coder = bound_coder(shape, profile, policy)
    source = tensor_digest(values.detach().cpu().to(torch.float32).numpy())
    plan = coder.plan(shape)
    entries, payloads, digests = [], [], []
    for page_id, (start, stop) in enumerate(page_spans(profile, shape)):
        segments = _seal_page(coder, plan, values, start, stop)
        entry = _entry(page_id, start, stop, source, coder, segments)
        entries.append(entry)
        payloads.append(b"".join(segment.to_bytes() for segment in segments))
        digests.append(segments_digest(entry, segments))
    counts = VectorCounts.of(entries)
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
        raw_nbytes=raw_nbytes(shape),
        encoded_nbytes=counts.nbytes,
        raw_reasons=counts.reasons,
        seconds=perf_counter() - began,
    )
    header = ArtifactHeader(shape=shape, profile=profile, policy=policy, receipt=receipt, pages=tuple(entries))
    return Artifact(header, tuple(payloads))


def _check_values(shape: KVShape, values: Tensor) -> None:
    expected = (shape.batch, shape.layers, shape.kv_heads, shape.tokens, shape.head_dim)
    if tuple(values.shape) != expected or values.dtype != TORCH_DTYPES[shape.dtype]:
        actual = f"{list(values.shape)} {values.dtype}"
        raise ContractError("encode_tensor.values", f"{list(expected)} {TORCH_DTYPES[shape.dtype]}", actual)
    if not bool(torch.isfinite(values).all()):
        raise EncodingError("encode_tensor.values: expected finite numbers, got NaN or infinity")


def _seal_page(coder: RoleCoder, plan: Plan, values: Tensor, start: int, stop: int) -> list[Segment]:
    layers = [
        coder.seal(values[:, layer, :, start:stop], page_runs(plan, layer, start, stop))
        for layer in range(values.shape[1])
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
        segments=tuple(segment.form.header for segment in segments),
    )
