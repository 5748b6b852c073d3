"""What is in a store, looked at without a model: objects checked, described, copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from fibkv.container import Bytes, Container, Kind, canonical
from fibkv.contract import Contract, Total
from fibkv.digest import canonical_json, require_digest
from fibkv.errors import ContractError, FibkvError, PageError
from fibkv.manifest import EndHeader, Root, SpanHeader
from fibkv.page_form import SegmentHeader
from fibkv.prefix_places import end_key, root_key, span_key
from fibkv.store.base import ASIDE, Entry, Store, set_aside
from fibkv.wire import PageContents

KINDS: dict[str, Kind] = {"roots": "root", "spans": "span", "ends": "end"}
"""Kinds of objects by the folder that they are kept in."""


class Checked(Contract):
    """One object that was looked at.

    Attributes:
        key: in the store.
        nbytes: of it.
        problem: why it is not what its key says; None = it is sound.
        moved_to: its new key, if it was moved aside.
    """

    key: str
    nbytes: Total
    problem: str | None = None
    moved_to: str | None = None


class PageSummary(Contract):
    """One page in words.

    Attributes:
        layer: its index.
        tokens: first and last.
        keys: codecs, with the vectors in each.
        values: likewise.
        nbytes: of the codes.
    """

    layer: Total
    tokens: str
    keys: str
    values: str
    nbytes: Total


class Copied(Contract):
    """What came of copying a store.

    Attributes:
        written: objects written.
        nbytes: bytes of these.
        there: objects that the target had already.
        damaged: keys of objects that did not stand the check, and were not copied.
    """

    written: Total
    nbytes: Total
    there: Total
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object, opened.

    Attributes:
        key: in the store.
        nbytes: of it.
        digest: of its container.
        header: a root, span or end.
        pages: its pages' headers, in order.
        page_nbytes: of the pages' containers.
        raw_nbytes: of raw tails.
    """

    key: str
    nbytes: int
    digest: str
    header: Root | SpanHeader | EndHeader
    pages: tuple[PageContents, ...]
    page_nbytes: int
    raw_nbytes: int

    def to_json(self) -> str:
        """All fields, as canonical JSON."""
        return canonical_json({field.name: getattr(self, field.name) for field in fields(self)})


def open_object(key: str, data: Bytes) -> StoredObject:
    """An object with all that can be checked without a model: sizes, digests, names, the headers of its pages.

    Raises:
        PageError, ContractError: it is not what its key says.
    """
    folder = key.split("/", maxsplit=1)[0]
    if folder not in KINDS:
        raise PageError(f"{key}: expected an object in one of {', '.join(KINDS)}")
    container = Container.read(data, KINDS[folder])
    header: Root | SpanHeader | EndHeader
    digests: tuple[str, ...] = ()
    match container.kind:
        case "root":
            header = canonical(container, Root)
            place = root_key(header.binding)
        case "span":
            header = canonical(container, SpanHeader)
            place, digests = span_key(header.name), header.pages
        case _:
            header = canonical(container, EndHeader)
            place, digests = end_key(header), header.pages
    if place != key:
        raise PageError(f"{key}: expected the object of this name, got that of {place}")
    if len(digests) > len(container.sections):
        raise PageError(f"{key}: expected {len(digests)} pages, got {len(container.sections)} sections")
    pages = tuple(_page(digest, data) for digest, data in zip(digests, container.sections, strict=False))
    page_nbytes = sum(len(section) for section in container.sections[: len(digests)])
    return StoredObject(
        key=key,
        nbytes=len(data),
        digest=container.digest,
        header=header,
        pages=pages,
        page_nbytes=page_nbytes,
        raw_nbytes=sum(len(section) for section in container.sections[len(digests) :]),
    )


def _page(digest: str, data: memoryview) -> PageContents:
    container = Container.read(data, "page")
    contents = PageContents.of(container)
    require_digest(f"page of layer {contents.page.layer}", digest, container.digest)
    return contents


def summarize(found: StoredObject) -> list[PageSummary]:
    """The pages of an object in words."""
    return [_summary(page) for page in found.pages]


def _summary(contents: PageContents) -> PageSummary:
    page, half = contents.page, len(contents.segments) // 2
    keys, values = (_codecs(contents.segments[part]) for part in (slice(half), slice(half, None)))
    return PageSummary(
        layer=page.layer,
        tokens=f"{page.start}..{page.start + page.tokens - 1}",
        keys=keys,
        values=values,
        nbytes=sum(segment.nbytes for segment in contents.segments),
    )


def _codecs(segments: Sequence[SegmentHeader]) -> str:
    counts: Counter[str] = Counter()
    for segment in segments:
        counts[segment.codec] += segment.num_vectors
    return ", ".join(f"{codec} {count}" for codec, count in counts.items())


def verify(store: Store, *, move_aside: bool = False) -> Iterator[Checked]:
    """Reads and checks every object, except those that were set aside before.

    Args:
        store: to look at.
        move_aside: whether objects that are damaged are set aside.

    Raises:
        StoreError: the store fails.
    """
    for entry in list(store.list()):
        data = None if entry.key.startswith(f"{ASIDE}/") else store.get(entry.key)
        if data is None:
            continue
        try:
            open_object(entry.key, data)
        except FibkvError as error:
            moved = set_aside(store, entry.key) if move_aside else None
            yield Checked(key=entry.key, nbytes=len(data), problem=str(error), moved_to=moved)
        else:
            yield Checked(key=entry.key, nbytes=len(data))


def copy(source: Store, target: Store) -> Copied:
    """Copies every sound object that the target does not have.

    Raises:
        StoreError: one of the stores fails.
    """
    written = nbytes = there = 0
    damaged = []
    # Roots first: without them nothing else is found.
    for entry in sorted(source.list(), key=lambda entry: (not entry.key.startswith("roots/"), entry.key)):
        if entry.key.startswith(f"{ASIDE}/"):
            continue
        if target.exists(entry.key):
            there += 1
            continue
        if (data := source.get(entry.key)) is None:
            continue
        try:
            open_object(entry.key, data)
        except FibkvError:
            damaged.append(entry.key)
            continue
        target.put(entry.key, data)
        written, nbytes = written + 1, nbytes + len(data)
    return Copied(written=written, nbytes=nbytes, there=there, damaged=tuple(damaged))


def find(store: Store, key: str) -> Entry:
    """The one object whose key begins so.

    Raises:
        ContractError: none does, or several do.
    """
    found = [entry for entry in store.list() if entry.key.startswith(key)]
    exact = [entry for entry in found if entry.key == key] or found
    if len(exact) != 1:
        raise ContractError("store key", "the beginning of one key", f"{key}, with which {len(exact)} begin")
    return exact[0]
