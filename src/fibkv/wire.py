"""Pages as bytes: docs/FORMAT.md. What a page's digest runs over is what its container holds, so one hash checks both.

A stored page is opened with the settings of the layer that will read it: its profiles must be theirs, and only
then do its bytes mean anything. Codes lie in canonical order, so that one vector is read by arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fibkv.coder import RoleCoder
from fibkv.container import Bytes, Container, canonical
from fibkv.contract import Contract
from fibkv.digest import require_digest
from fibkv.errors import ContractError, PageError
from fibkv.packed import Held, Stored
from fibkv.page import Page, PageHeader, Segment, stored_header
from fibkv.page_form import FALLBACKS, PageForm, Rectangle, SegmentForm, SegmentHeader, shared
from fibkv.policy import Decision, Run
from fibkv.sealing import LayerSettings
from fibkv.shape import Role
from fibkv.tables import Tables

Packing = Callable[
    [Sequence[tuple[Tables, Role]], Sequence[tuple[int, int]], Sequence[Sequence[memoryview]]], Sequence[Sequence[Held]]
]
"""Of pages that are alike: tables and role, heads and tokens of their segments; canonical bytes, page by page; to codes
in memory. See `fibkv.kernels.native.Native.pack_bytes`."""

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
        _check_sizes([one.nbytes for one in contents.segments], container)
        return contents


@dataclass(frozen=True, slots=True, eq=False)
class StoredPage:
    """A page in the bytes that it came in, which may be a mapped file. Structure is checked, contents are not yet.

    Attributes:
        layer: that it belongs to.
        start: its first token.
        form: its tokens and segments.
        profiles: digests of the keys' and the values' profile.
        container: it all; section i is the codes of segment i.
    """

    layer: int
    start: int
    form: PageForm
    profiles: tuple[str, str]
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
        half = len(self.form.keys)
        side = slice(0, half) if role == "key" else slice(half, None)
        for form, codes in zip(self.form.segments[side], self.container.sections[side], strict=True):
            (h0, h1), (t0, t1) = form.heads, form.tokens
            if h0 <= head < h1 and t0 <= token < t1:
                return _vector(form, codes, head, token)
        raise ContractError("StoredPage.vector", f"a head and a token below {self.form.tokens}", (head, token))

    def page(self, held: Sequence[Held]) -> Page:
        """The page with these codes, of its keys' segments and then of its values'."""
        return Page(self.layer, self.start, self.form, tuple(held), *self.profiles, self.container.digest)


class PageReader:
    """Opens stored pages of one layer, for any thread. What segments of equal headers are is worked out once.

    Args:
        settings: of the layer.
    """

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self._profiles = settings.keys.profile_digest, settings.values.profile_digest
        self._forms: dict[tuple[int, bytes], PageForm] = {}
        # Of the page that was opened last: the next one is likely to be alike.
        self._likely: PageForm | None = None

    def open(self, data: Bytes, start: int | None = None) -> StoredPage:
        """Opens a stored page. Reads its headers only.

        Args:
            data: the container.
            start: its first token, if that is known: a page that is there, in the form of the one before it, is
                recognized without a parser.

        Raises:
            DigestMismatch: it is coded by other profiles than the layer's.
            PageError, ContractError: it is no page, of another layer, or its segments do not cover its rectangle once.
        """
        if start is not None and (form := self._likely) is not None:
            header = stored_header(self.settings.layer, start, form, self._profiles)
            container = Container.expected(data, "page", header, form.sizes)
            if container is not None:
                return StoredPage(self.settings.layer, start, form, self._profiles, container)
        return self._parse(Container.parse(data, "page"))

    def _parse(self, container: Container) -> StoredPage:
        page, segments = _split(container)
        if page.layer != self.settings.layer:
            raise PageError(f"page: expected layer {self.settings.layer}, got {page.layer}")
        for name, profile in zip(("key_profile", "value_profile"), self._profiles, strict=True):
            require_digest(f"page of layer {page.layer} {name}", profile, getattr(page, name))
        form = self._forms.get((page.tokens, segments))
        if form is None:
            form = self._learn(page, segments, container)
        _check_sizes(form.sizes, container)
        self._likely = form
        return StoredPage(page.layer, page.start, form, self._profiles, container)

    def _learn(self, page: PageHeader, text: bytes, container: Container) -> PageForm:
        """What the segments of a page are, keys first: checked, and remembered by their header."""
        headers = PageContents.of(container).segments
        half, forms = len(headers) // 2, []
        for coder, side in ((self.settings.keys, headers[:half]), (self.settings.values, headers[half:])):
            _check_inside(page, side, self.settings.key_shape.kv_heads)
            forms += [_form(coder, page, header) for header in side]
            _check_cover(page, side, self.settings.key_shape.kv_heads)
        if len(self._forms) >= MAX_FORMS:
            self._forms.clear()
        found = shared(PageForm(page.tokens, tuple(forms[:half]), tuple(forms[half:])))
        self._forms[page.tokens, text] = found
        return found


def load_pages(stored: Sequence[StoredPage], pack: Packing | None = None) -> list[Page]:
    """Pages, checked against their digests.

    Segments of one codec and size are checked, and put in order, together: of all layers, for the pages of a span.

    Args:
        stored: what was opened.
        pack: puts codes into memory of their own, in the order of kernels;
            None = they are still where they were read, and a cache takes them over.

    Raises:
        DigestMismatch: the contents are not those that were sealed.
        PageError: codes that no encoder makes.
    """
    for one in stored:
        one.container.check_digest()
    alike: dict[tuple[Rectangle, ...], list[int]] = {}
    for index, one in enumerate(stored):
        alike.setdefault(one.form.rectangles, []).append(index)
    parts: dict[Rectangle, list[memoryview]] = {}
    for rectangles, indices in alike.items():
        for at, rectangle in enumerate(rectangles):
            parts.setdefault(rectangle, []).extend(stored[index].container.sections[at] for index in indices)
    for (codec, groups, tokens), same in parts.items():
        codec.check_bytes(same, groups, tokens)
    pages: dict[int, Page] = {}
    for rectangles, indices in alike.items():
        read = [stored[index].container.sections for index in indices]
        held = _stored(rectangles, read) if pack is None else pack(_sides(rectangles), _extents(rectangles), read)
        pages.update((index, stored[index].page(codes)) for index, codes in zip(indices, held, strict=True))
    return [pages[index] for index in range(len(stored))]


def _stored(rectangles: Sequence[Rectangle], pages: Sequence[Sequence[memoryview]]) -> list[list[Stored]]:
    """Codes that stay where they were read."""
    return [
        [
            Stored(section, groups, tokens, codec.from_bytes)
            for section, (codec, groups, tokens) in zip(page, rectangles, strict=True)
        ]
        for page in pages
    ]


def _sides(rectangles: Sequence[Rectangle]) -> list[tuple[Tables, Role]]:
    half = len(rectangles) // 2
    keys: list[tuple[Tables, Role]] = [(codec.tables, "key") for codec, _, _ in rectangles[:half]]
    return [*keys, *((codec.tables, "value") for codec, _, _ in rectangles[half:])]


def _extents(rectangles: Sequence[Rectangle]) -> list[tuple[int, int]]:
    return [(groups, tokens) for _, groups, tokens in rectangles]


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


def _vector(form: SegmentForm, codes: memoryview, head: int, token: int) -> Tensor:
    """One vector ``[d]`` float32 of a head of the layer and a token of the page; reads no other."""
    codec, group, step = form.codec, head - form.heads[0], token - form.tokens[0]
    picked, offset = [], 0
    for one, two, all_ in zip(*(codec.layout(count) for count in (1, 2, form.length)), strict=True):
        # What the tokens of a group share comes once; else the bytes of one token follow those of another.
        stride = two.nbytes - one.nbytes
        start = offset + group * all_.nbytes + step * stride
        picked.append(bytes(codes[start : start + one.nbytes]))
        offset += form.groups * all_.nbytes
    of_one = codec.from_bytes(memoryview(b"".join(picked)), 1, 1)
    out = torch.empty(1, 1, codec.head_dim)
    Segment(replace(form, heads=(head, head + 1), tokens=(0, 1)), of_one).decode(out)
    return out[0, 0]


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
    codec = coder.codec_of_segment(header, decision)
    return shared(SegmentForm(header.heads, header.tokens, decision, header.reasons, codec, space))


def _check_sizes(stated: Sequence[int], container: Container) -> None:
    actual = [len(one) for one in container.sections]
    if list(stated) != actual or len(actual) % 2:
        raise PageError(f"page container: expected sections of {list(stated)} bytes for two roles alike, got {actual}")


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
