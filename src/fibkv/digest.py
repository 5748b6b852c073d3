"""Digests: what names a contract, a tensor or a block of bytes.

A digest is the text ``blake3:`` followed by 64 lower-case hexadecimal digits. The hash runs over a
domain string, one zero byte and the payload, so that equal payloads of different kinds differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from pydantic import BaseModel, StringConstraints

from fibkv.errors import ContractError, DigestMismatch, EncodingError

Digest = Annotated[str, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
"""Field type: the text of a digest."""

DigestOrNone = Annotated[str, StringConstraints(pattern=r"^(blake3:[0-9a-f]{64}|none:[a-z0-9_]+)$")]
"""Field type: a digest, or ``none:<codec>`` where the codec has no such object."""

TENSOR_DOMAIN = "fib_quant_kv_tensor_f32_v1"
"""Domain of the digest of a tensor's values."""

# BLAKE3 is fastest where much lies in one piece and begins on a boundary of 1 KiB: a page takes two thirds of the time
# when it is joined, in the processor's cache, before it is hashed. Copies that leave the cache would cost more.
_MAX_JOINED_NBYTES = 1 << 18

JsonValue = BaseModel | Mapping[str, object] | Sequence[object] | str | int | float | bool | None
"""What :func:`canonical_json` takes: contracts and plain JSON values, nested at will."""


def canonical_json(value: JsonValue) -> str:
    """Compact JSON text of a value, the same on every machine.

    Fields stand in declaration order (mappings in their own), without spaces and without escapes for
    non-ASCII text. Floats are Python's ``repr``: the shortest digits that round-trip, ``2.0`` for two.

    Raises:
        ContractError: a number is not finite, or a value has no JSON form.
    """
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode()  # refuses lone surrogates, which have no UTF-8 form
    except (TypeError, ValueError) as error:
        raise ContractError("canonical_json", "finite, JSON-representable values", str(error)) from error
    return text


def _plain(value: object) -> dict[str, object]:
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def digest(domain: str, value: JsonValue) -> str:
    """Digest of the canonical JSON of a value.

    Large things (codebooks, rotations, pages) are hashed by :func:`digest_bytes` instead, never as
    JSON numbers.

    Raises:
        ContractError: the domain is empty or contains a zero byte, or the value has no canonical JSON.
    """
    return digest_bytes(domain, canonical_json(value).encode())


def digest_bytes(domain: str, *chunks: bytes | memoryview | npt.NDArray[np.generic]) -> str:
    """Digest of bytes: of the chunks as if they were one.

    An array counts as its elements in C order and its own byte order; callers that share digests
    between machines hand in little endian.

    Raises:
        ContractError: the domain is empty or contains a zero byte, or an array holds Python objects.
    """
    if not domain or "\0" in domain:
        raise ContractError("digest.domain", "a non-empty text without zero bytes", domain)
    parts: list[bytes | memoryview] = [domain.encode(), b"\0"]
    parts += [_array_bytes(chunk) if isinstance(chunk, np.ndarray) else chunk for chunk in chunks]
    if sum(map(len, parts)) <= _MAX_JOINED_NBYTES:
        return f"blake3:{blake3(b''.join(parts)).hexdigest()}"
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return f"blake3:{hasher.hexdigest()}"


def _array_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    if array.dtype.hasobject:
        # The bytes of such an array are addresses.
        raise ContractError("digest.chunk", "an array of numbers", f"an array of dtype {array.dtype}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def tensor_digest(values: npt.NDArray[np.floating]) -> str:
    """Digest of a tensor's values, whatever floating-point type holds them.

    Hashes the element count as u64 and the values as f32, both little endian, behind
    :data:`TENSOR_DOMAIN`.

    Args:
        values: [batch, layers, kv_heads, tokens, head_dim] or any other shape, in canonical order;
            f16, f32 or f64. Values are rounded to f32 first, so f16 values and their f32 equals agree.

    Raises:
        EncodingError: the values are not floating point, or one of them is not finite as f32.
    """
    if not np.issubdtype(values.dtype, np.floating):
        raise EncodingError(f"tensor digest: expected floating-point values, got dtype {values.dtype}")
    # A value above the f32 range becomes infinite here and is refused below, by its index.
    with np.errstate(over="ignore"):
        singles = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    finite = np.isfinite(singles)
    if not finite.all():
        index = int(np.argmin(finite))
        value = values.reshape(-1)[index]
        raise EncodingError(f"tensor digest: expected finite f32 values, got {value} at flat index {index}")
    return digest_bytes(TENSOR_DOMAIN, singles.size.to_bytes(8, "little"), singles)


def require_digest(field: str, expected: str, actual: str) -> None:
    """Check that a digest is the expected one.

    Raises:
        DigestMismatch: it is not; the error carries the field and both digests.
    """
    if expected != actual:
        raise DigestMismatch(field, expected, actual)
