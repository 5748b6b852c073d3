"""The binary container of stored pages and of what says where they belong: docs/FORMAT.md is its definition.

Sixty-four bytes of numbers, the sizes of the sections, a header in canonical JSON, and the sections, each on a
boundary of 64 bytes. Everything is little endian. A container is read in place: its sections are views of the
bytes it was given, which may be a mapped file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar, get_args

from fibkv.contract import Contract
from fibkv.digest import digest_bytes, require_digest
from fibkv.errors import PageError
from fibkv.page import PAGE_DOMAIN

Kind = Literal["page", "root", "span", "end", "chunk"]
Bytes = bytes | memoryview
Parsed = TypeVar("Parsed", bound=Contract)

MAGIC = b"\x89fibkv\r\n"
VERSION = 1
ALIGNMENT = 64
# A root of 128 layers has 80 KiB.
MAX_HEADER_NBYTES = 1 << 20
# What sizes and header may take in memory beyond the size of the container.
SPARE_NBYTES = 1 << 20

_KINDS: dict[Kind, int] = {kind: number for number, kind in enumerate(get_args(Kind), start=1)}
_DOMAINS: dict[Kind, str] = {
    "page": PAGE_DOMAIN,
    "root": "fibkv_root_v1",
    "span": "fibkv_span_v1",
    "end": "fibkv_end_v1",
    "chunk": "fibkv_chunk_v1",
}
# Its sections are pages: containers with digests of their own, which its header names.
_SELF_VERIFYING: frozenset[Kind] = frozenset({"span"})
_HEAD = struct.Struct("<8sHHIQQ32s")
assert _HEAD.size == ALIGNMENT
# Where the digest lies in it.
_DIGEST = slice(_HEAD.size - 32, _HEAD.size)


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """A container whose sizes are right. `check_digest` says whether its contents are.

    Attributes:
        kind: what it holds.
        header: canonical JSON.
        sections: views of the bytes that it was read from.
        digest: as stated in it.
    """

    kind: Kind
    header: bytes
    sections: tuple[memoryview, ...]
    digest: str

    @classmethod
    def parse(cls, data: Bytes, kind: Kind | None = None) -> Container:
        """The container in ``data``. Sizes are checked before anything is read or allocated; sections are not read.

        Args:
            data: all of it and nothing else.
            kind: that is expected; None = any.

        Raises:
            PageError: another marker, version or kind; sizes that do not add up to those of ``data``; more sections or
                values in the header than memory for them; filling bytes that are not zero.
        """
        view = memoryview(data).cast("B")
        if len(view) < ALIGNMENT:
            raise PageError(f"container: expected at least {ALIGNMENT} bytes, got {len(view)}")
        magic, version, number, count, header_nbytes, nbytes, stated = _HEAD.unpack_from(view)
        found = _kind_of(magic, version, number, kind)
        if nbytes != len(view):
            what = "truncated" if len(view) < nbytes else "trailing bytes"
            raise PageError(f"{found} container: {what}, expected {nbytes} bytes, got {len(view)}")
        # As numbers first: a table or header of any claimed length costs nothing until it is known to be there.
        body = ALIGNMENT + 8 * count + header_nbytes
        if header_nbytes > MAX_HEADER_NBYTES or body > nbytes:
            raise PageError(
                f"{found} container: expected a header of at most {MAX_HEADER_NBYTES} bytes and {count} sizes within "
                f"{nbytes} bytes, got a header of {header_nbytes} bytes"
            )
        header = bytes(view[body - header_nbytes : body])
        _require_affordable(found, header, count, nbytes)
        sizes = struct.unpack_from(f"<{count}Q", view, ALIGNMENT)
        expected = aligned(body) + sum(aligned(size) for size in sizes)
        if expected != nbytes:
            raise PageError(f"{found} container: expected {expected} bytes by its sections, got {nbytes}")
        sections, offset = [], aligned(body)
        _require_zeros(found, view[body:offset])
        for size in sizes:
            sections.append(view[offset : offset + size])
            _require_zeros(found, view[offset + size : offset + aligned(size)])
            offset += aligned(size)
        return cls(found, header, tuple(sections), f"blake3:{stated.hex()}")

    @classmethod
    def expected(cls, data: Bytes, kind: Kind, header: bytes, sizes: Sequence[int]) -> Container | None:
        """The container in ``data``, if it is one of this header and of sections of these sizes; else None.

        Without a parser: so many bytes can only begin in one way.
        """
        view, layout = memoryview(data).cast("B"), _layout(kind, len(header), tuple(sizes))
        found = bytes(view[: layout.start])
        digest = found[_DIGEST]
        if len(view) != layout.nbytes or found != layout.beginning(header, digest):
            return None
        if any(bytes(view[start:stop]).strip(b"\0") for start, stop in layout.fillings):
            return None
        sections = tuple([view[start:stop] for start, stop in layout.places])
        return cls(kind, header, sections, f"blake3:{digest.hex()}")

    @classmethod
    def read(cls, data: Bytes, kind: Kind | None = None) -> Container:
        """`parse` and `check_digest`."""
        container = cls.parse(data, kind)
        container.check_digest()
        return container

    def check_digest(self) -> None:
        """Checks the contents against the digest: of a span its header, for its pages check themselves.

        Raises:
            DigestMismatch: the contents are not those that were written.
        """
        require_digest(f"{self.kind} container", self.digest, _digest(self.kind, self.header, self.sections))


class Draft:
    """A container on its way: the sections are written in place, then `finish` makes it one.

    Args:
        kind: what it holds.
        header: canonical JSON.
        sizes: of the sections.
        into: `packed_nbytes` zeros to write it to; None = new memory.

    Attributes:
        data: all of it.
        sections: writable views of it.

    Raises:
        PageError: a header longer than `MAX_HEADER_NBYTES`, or one that no reader would take.
    """

    def __init__(self, kind: Kind, header: bytes, sizes: Sequence[int], into: memoryview | None = None) -> None:
        if len(header) > MAX_HEADER_NBYTES:
            raise PageError(f"{kind} header: expected at most {MAX_HEADER_NBYTES} bytes, got {len(header)}")
        self.kind = kind
        self.header = header
        layout = _layout(kind, len(header), tuple(sizes))
        self.data = memoryview(bytearray(layout.nbytes)) if into is None else into
        _require_affordable(kind, header, len(sizes), layout.nbytes)
        self.data[: layout.start] = layout.beginning(header)
        self.sections = tuple([self.data[start:stop] for start, stop in layout.places])

    def finish(self) -> str:
        """Seals what was written; returns the digest."""
        digest = _digest(self.kind, self.header, self.sections)
        self.data[_DIGEST] = bytes.fromhex(digest.removeprefix("blake3:"))
        return digest


def pack(kind: Kind, header: bytes, sections: Sequence[Bytes]) -> bytes:
    """The container of a header and sections. Equal contents give equal bytes.

    Raises:
        PageError: a header longer than `MAX_HEADER_NBYTES`.
    """
    draft = Draft(kind, header, [memoryview(section).nbytes for section in sections])
    for place, section in zip(draft.sections, sections, strict=True):
        place[:] = section
    draft.finish()
    return bytes(draft.data)


def packed_nbytes(header_nbytes: int, sizes: Sequence[int]) -> int:
    """Bytes of a container with a header of so many bytes and sections of these sizes."""
    return _layout("page", header_nbytes, tuple(sizes)).nbytes


def canonical(container: Container, contract: type[Parsed]) -> Parsed:
    """The header of a container as a contract.

    Raises:
        PageError, ContractError: it is none, or not in canonical form.
    """
    header = contract.from_json(container.header)
    if header.to_json().encode() != container.header:
        raise PageError(f"{container.kind} header: expected canonical JSON")
    return header


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies in a container of a kind, a header's length and sections' sizes.

    Attributes:
        head: its first bytes, up to the digest.
        table: the sizes of its sections.
        start: of the first section.
        places: of each section its start and its end.
        fillings: start and end of what fills up sections, where that is more than nothing.
        nbytes: of the container.
    """

    head: bytes
    table: bytes
    start: int
    places: tuple[tuple[int, int], ...]
    fillings: tuple[tuple[int, int], ...]
    nbytes: int

    def beginning(self, header: bytes, digest: bytes = bytes(32)) -> bytes:
        """What comes before the sections."""
        return b"".join((self.head, digest, self.table, header)).ljust(self.start, b"\0")


# The pages of a cache have a handful of forms, and headers of a few lengths.
@lru_cache(maxsize=64)
def _layout(kind: Kind, header_nbytes: int, sizes: tuple[int, ...]) -> _Layout:
    start = end = aligned(ALIGNMENT + 8 * len(sizes) + header_nbytes)
    places, fillings = [], []
    for size in sizes:
        places.append((end, end + size))
        end += aligned(size)
        if size % ALIGNMENT:
            fillings.append((places[-1][1], end))
    head = _HEAD.pack(MAGIC, VERSION, _KINDS[kind], len(sizes), header_nbytes, end, bytes(32))
    table = struct.pack(f"<{len(sizes)}Q", *sizes)
    return _Layout(head[: _DIGEST.start], table, start, tuple(places), tuple(fillings), end)


def _digest(kind: Kind, header: bytes, sections: Sequence[Bytes]) -> str:
    hashed = () if kind in _SELF_VERIFYING else sections
    return digest_bytes(_DOMAINS[kind], header, b"\0", *hashed)


def _kind_of(magic: bytes, version: int, number: int, expected: Kind | None) -> Kind:
    if magic != MAGIC:
        raise PageError(f"container marker: expected {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise PageError(f"container version: expected {VERSION}, got {version}")
    found = next((kind for kind, known in _KINDS.items() if known == number), None)
    if found is None or expected not in (None, found):
        wanted = expected or f"one of {', '.join(_KINDS)}"
        raise PageError(f"container kind: expected {wanted}, got {found or number}")
    return found


def _require_affordable(kind: Kind, header: bytes, num_sections: int, nbytes: int) -> None:
    """Refuses what would be many times larger in memory than it is: values of JSON, and sections of no bytes.

    What text, arrays, objects, members, items and sections take at most, contracts and messages included, is measured;
    tests/fuzz holds the parsers to it.
    """
    values = 80 * header.count(b"[") + 250 * header.count(b"{") + 200 * header.count(b":") + 100 * header.count(b",")
    cost = len(header) * (8 if header.isascii() else 24) + values + 320 * num_sections
    if cost > nbytes + SPARE_NBYTES:
        raise PageError(
            f"{kind} container: expected a header and sections that take at most {nbytes + SPARE_NBYTES} bytes in "
            f"memory, got up to {cost}"
        )


def _require_zeros(kind: Kind, filling: memoryview) -> None:
    if any(filling):
        raise PageError(f"{kind} container: expected zeros between its sections, got {bytes(filling)!r}")
