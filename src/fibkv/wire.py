"""Pages as bytes: docs/FORMAT.md. What a page's digest runs over is what its container holds, so one hash checks both.

A stored page is opened with the settings of the layer that will read it: its profiles must be theirs, and only
then do its bytes mean anything. Codes lie in canonical order, so that one vector is read by arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fibkv.codecs import Codec
from fibkv.coder import RoleCoder
from fibkv.container import Bytes, Container, Draft, canonical, packed_nbytes
from fibkv.contract import Contract
from fibkv.digest import require_digest
from fibkv.errors import ContractError, PageError
from fibkv.packed import Held, Packed, Stored, write_runs
from fibkv.page import FALLBACKS, Page, PageHeader, Segment, SegmentHeader
from fibkv.policy import Decision, Run
from fibkv.sealing import LayerSettings
from fibkv.shape import Role
from fibkv.space import KeySpace

# The header of a page in canonical JSON, so that equal segments are recognized by their bytes.
_BEFORE, _BETWEEN = b'{"page":', b',"segments":'
# The canonical JSON of a page whose profiles are digests: what is so needs no parser.
_NUMBER, _DIGEST = rb"(0|[1-9][0-9]{0,18})", rb'"(blake3:[0-9a-f]{64})"'
_PAGE = re.compile(
    rb'{"page":{"layer":%b,"start":%b,"tokens":%b,"key_profile":%b,"value_profile":%b},"segments":'
    % (_NUMBER, _NUMBER, _NUMBER, _DIGEST, _DIGEST)
)
# A layer has a handful: the first page, those behind it, fallbacks. Bounds what a hostile store can make it remember.
MAX_FORMS = 64


class PageContents(Contract):
    """The header of a page's container: the segments of its keys, then those of its values."""

    page: PageHeader
    segments: tuple[SegmentHeader, ...]

    @classmethod
    def of(cls, container: Container) -> PageContents:
        """The header of a container, in canonical form, with segments of the sizes that the container has.

        Raises:
            PageError, ContractError: it is not so.
        """
        contents = canonical(container, cls)
        _check_sizes(contents.segments, container)
        return contents


@dataclass(frozen=True, slots=True, eq=False)
class SegmentForm:
    """What a segment's header says, in the terms of the layer that it belongs to.

    Attributes:
        header: of the segment.
        decision: of the policy that it was made under.
        codec: of its codes.
        space: of its keys, if they were taken to one.
    """

    header: SegmentHeader
    decision: Decision
    codec: Codec
    space: KeySpace | None

    @property
    def groups(self) -> int:
        """Heads."""
        return self.header.heads[1] - self.header.heads[0]

    @property
    def tokens(self) -> int:
        """Tokens."""
        return self.header.tokens[1] - self.header.tokens[0]

    def segment(self, codes: Held) -> Segment:
        """The segment with these codes."""
        header = self.header
        return Segment(header.heads, header.tokens, self.decision, header.reasons, self.codec, codes, self.space)


@dataclass(frozen=True, slots=True, eq=False)
class StoredSegment:
    """One segment of a stored page: what it is, and its canonical bytes where they lie."""

    form: SegmentForm
    codes: memoryview

    def segment(self) -> Segment:
        """The segment, with its codes where they lie."""
        form = self.form
        return form.segment(Stored(self.codes, form.groups, form.tokens, form.codec.from_bytes))

    def vector(self, head: int, token: int) -> Tensor:
        """One vector ``[d]`` float32 of a head of the layer and a token of the page; reads no other."""
        form = self.form
        group, step = head - form.header.heads[0], token - form.header.tokens[0]
        picked, offset = [], 0
        for one, two, all_ in zip(*(form.codec.layout(count) for count in (1, 2, form.tokens)), strict=True):
            # What the tokens of a group share comes once; else the bytes of one token follow those of another.
            stride = two.nbytes - one.nbytes
            start = offset + group * all_.nbytes + step * stride
            picked.append(bytes(self.codes[start : start + one.nbytes]))
            offset += form.groups * all_.nbytes
        codes = form.codec.from_bytes(memoryview(b"".join(picked)), 1, 1)
        out = torch.empty(1, 1, form.codec.head_dim)
        replace(form.segment(codes), heads=(head, head + 1), tokens=(0, 1)).decode(out)
        return out[0, 0]


@dataclass(frozen=True, slots=True, eq=False)
class StoredPage:
    """A page in the bytes that it came in, which may be a mapped file. Structure is checked, contents are not yet.

    Attributes:
        header: of the page.
        keys: segments of the keys.
        values: segments of the values.
        container: it all.
    """

    header: PageHeader
    keys: tuple[StoredSegment, ...]
    values: tuple[StoredSegment, ...]
    container: Container

    def vector(self, role: Role, head: int, token: int) -> Tensor:
        """One decoded vector ``[d]`` float32, found by arithmetic: nothing else is read, nor is the digest checked.

        Args:
            role: key or value.
            head: KV head.
            token: of the page, 0 to its number of tokens - 1.

        Raises:
            ContractError: the page has no such head or token.
            PageError: a vector that no encoder makes.
        """
        for segment in self.keys if role == "key" else self.values:
            (h0, h1), (t0, t1) = segment.form.header.heads, segment.form.header.tokens
            if h0 <= head < h1 and t0 <= token < t1:
                return segment.vector(head, token)
        raise ContractError("StoredPage.vector", f"a head and a token below {self.header.tokens}", (head, token))


class PageReader:
    """Opens stored pages of one layer. What segments of equal headers are is worked out once.

    Args:
        settings: of the layer.
    """

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self._forms: dict[tuple[int, bytes], tuple[SegmentForm, ...]] = {}

    def open(self, data: Bytes) -> StoredPage:
        """Opens a stored page. Reads its headers only.

        Args:
            data: the container.

        Raises:
            DigestMismatch: it is coded by other profiles than the layer's.
            PageError, ContractError: it is no page, of another layer, or its segments do not cover its rectangle once.
        """
        container = Container.parse(data, "page")
        page, segments = _split(container)
        if page.layer != self.settings.layer:
            raise PageError(f"page: expected layer {self.settings.layer}, got {page.layer}")
        for name, coder in (("key_profile", self.settings.keys), ("value_profile", self.settings.values)):
            require_digest(f"page of layer {page.layer} {name}", coder.profile_digest, getattr(page, name))
        forms = self._forms.get((page.tokens, segments))
        if forms is None:
            forms = self._learn(page, segments, container)
        _check_sizes([form.header for form in forms], container)
        stored, half = tuple(map(StoredSegment, forms, container.sections)), len(forms) // 2
        return StoredPage(page, stored[:half], stored[half:], container)

    def _learn(self, page: PageHeader, segments: bytes, container: Container) -> tuple[SegmentForm, ...]:
        """What the segments of a page are, keys first: checked, and remembered by their header."""
        headers = PageContents.of(container).segments
        half, forms = len(headers) // 2, []
        for coder, side in ((self.settings.keys, headers[:half]), (self.settings.values, headers[half:])):
            _check_inside(page, side, self.settings.key_shape.kv_heads)
            forms += [_form(coder, page, header) for header in side]
            _check_cover(page, side, self.settings.key_shape.kv_heads)
        if len(self._forms) >= MAX_FORMS:
            self._forms.clear()
        self._forms[page.tokens, segments] = found = tuple(forms)
        return found


def load_pages(stored: Sequence[StoredPage]) -> list[Page]:
    """Pages, checked against their digests. Their codes are still where they were read; a cache takes them over.

    Segments of one codec and size are checked together: of all layers, for the pages of a span.

    Raises:
        DigestMismatch: the contents are not those that were sealed.
        PageError: codes that no encoder makes.
    """
    for page in stored:
        page.container.check_digest()
    alike: dict[tuple[Codec, int, int], list[StoredSegment]] = {}
    for segment in (segment for page in stored for segment in (*page.keys, *page.values)):
        alike.setdefault((segment.form.codec, segment.form.groups, segment.form.tokens), []).append(segment)
    for (codec, groups, tokens), same in alike.items():
        codec.check_bytes([one.codes for one in same], groups, tokens)
    return [_page(page) for page in stored]


def _page(stored: StoredPage) -> Page:
    head = stored.header
    keys, values = (tuple(one.segment() for one in side) for side in (stored.keys, stored.values))
    profiles = (head.key_profile, head.value_profile)
    return Page(head.layer, head.start, head.tokens, keys, values, *profiles, stored.container.digest)


@dataclass(frozen=True, slots=True, eq=False)
class PageDraft:
    """A page that is to be written, with what its container begins with.

    Attributes:
        page: it.
        header: of its container.
        sizes: of the sections.
    """

    page: Page
    header: bytes
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, page: Page) -> PageDraft:
        """The draft of a page."""
        return cls(page, *page.headers())

    @property
    def nbytes(self) -> int:
        """Bytes of the container."""
        return packed_nbytes(len(self.header), self.sizes)


def write_pages(drafts: Sequence[PageDraft], places: Sequence[memoryview]) -> None:
    """Writes the containers of pages, the codes of all of them together.

    Args:
        drafts: what to write.
        places: for each as many writable zeros as its `PageDraft.nbytes`.

    Raises:
        DigestMismatch: a page was damaged after it was sealed, and must not get a stored form.
    """
    pairs = zip(drafts, places, strict=True)
    containers = [Draft("page", draft.header, draft.sizes, place) for draft, place in pairs]
    packed: list[tuple[Packed, memoryview]] = []
    for draft, container in zip(drafts, containers, strict=True):
        for segment, section in zip((*draft.page.keys, *draft.page.values), container.sections, strict=True):
            if isinstance(segment.held, Packed):
                packed.append((segment.held, section))
            else:
                section[:] = segment.to_bytes()
    write_runs([codes for codes, _ in packed], [section for _, section in packed])
    for draft, container in zip(drafts, containers, strict=True):
        page = draft.page
        require_digest(f"Page(layer={page.layer}, start={page.start})", page.digest, container.finish())


def page_to_bytes(page: Page) -> bytes:
    """The container of a page; see `write_pages`."""
    draft = PageDraft.of(page)
    data = bytearray(draft.nbytes)
    write_pages([draft], [memoryview(data)])
    return bytes(data)


def _split(container: Container) -> tuple[PageHeader, bytes]:
    """The page's own header, in canonical form, and what follows it."""
    if canonical_page := _PAGE.match(container.header):
        layer, start, tokens, *profiles = canonical_page.groups()
        key_profile, value_profile = (profile.decode() for profile in profiles)
        numbers = {"layer": int(layer), "start": int(start), "tokens": int(tokens)}
        page = PageHeader(**numbers, key_profile=key_profile, value_profile=value_profile)
        return page, container.header[canonical_page.end() :]
    text, found, rest = container.header.removeprefix(_BEFORE).partition(_BETWEEN)
    if not found:
        raise PageError("page header: expected canonical JSON with the fields page and segments")
    page = PageHeader.from_json(text)
    if b"".join((_BEFORE, page.to_json().encode(), _BETWEEN, rest)) != container.header:
        raise PageError("page header: expected canonical JSON")
    return page, rest


def _form(coder: RoleCoder, page: PageHeader, header: SegmentHeader) -> SegmentForm:
    """The form of a segment whose header is one that the coder would give it, were the decision taken again."""
    if header.action not in ("compress", "keep_raw"):
        raise PageError(f"{_place(page)}: expected a segment that is compressed or raw, got {header.action!r}")
    fell_back = bool(FALLBACKS.intersection(header.reasons))
    reasons = tuple(reason for reason in header.reasons if reason not in FALLBACKS)
    decision = Decision.model_validate({"action": header.action, "axis": header.axis, "reasons": reasons})
    run = Run(layers=(page.layer, page.layer + 1), heads=header.heads, tokens=header.tokens, decision=decision)
    coder.check_segment(_place(page), header, run)
    space = coder.space if decision.action == "compress" and not fell_back else None
    return SegmentForm(header, decision, coder.codec_of_segment(header, decision), space)


def _check_sizes(headers: Sequence[SegmentHeader], container: Container) -> None:
    stated, actual = [one.nbytes for one in headers], [len(one) for one in container.sections]
    if stated != actual or len(stated) % 2:
        raise PageError(f"page container: expected sections of {stated} bytes for two roles alike, got {actual}")


def _check_inside(page: PageHeader, segments: Sequence[SegmentHeader], kv_heads: int) -> None:
    """Refuses rectangles that are empty or reach out of the page's ``kv_heads`` x tokens."""
    for one in segments:
        if not (0 <= one.heads[0] < one.heads[1] <= kv_heads and 0 <= one.tokens[0] < one.tokens[1] <= page.tokens):
            raise PageError(
                f"{_place(page)}: expected segments within {kv_heads} heads x {page.tokens} tokens, got heads "
                f"{one.heads} x tokens {one.tokens}"
            )


def _check_cover(page: PageHeader, segments: Sequence[SegmentHeader], kv_heads: int) -> None:
    """Refuses segments that do not cover ``kv_heads`` x tokens exactly once; they have the bytes that they claim."""
    area = sum(one.num_vectors for one in segments)
    covered = np.zeros((kv_heads, page.tokens if area == kv_heads * page.tokens else 0), dtype=bool)
    for one in segments:
        covered[slice(*one.heads), slice(*one.tokens)] = True
    if not covered.size or not covered.all():
        raise PageError(
            f"{_place(page)}: expected segments that cover {kv_heads} heads x {page.tokens} tokens once, got "
            f"{[(one.heads, one.tokens) for one in segments][:8]}"
        )


def _place(page: PageHeader) -> str:
    return f"page of layer {page.layer} at token {page.start}"
