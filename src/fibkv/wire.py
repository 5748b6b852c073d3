"""Pages as bytes: docs/FORMAT.md. What a page's digest runs over is what its container holds, so one hash checks both.

A stored page is opened with the settings of the layer that will read it: its profiles must be theirs, and only
then do its bytes mean anything. Codes lie in canonical order, so that one vector is read by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fibkv.codecs import Codec
from fibkv.coder import RoleCoder
from fibkv.container import Bytes, Container, canonical, pack
from fibkv.contract import Contract
from fibkv.digest import canonical_json, require_digest
from fibkv.errors import ContractError, PageError
from fibkv.page import NOT_ENCODABLE, Page, PageHeader, Segment, SegmentHeader, segment_from_bytes
from fibkv.policy import Decision, Run
from fibkv.sealing import LayerSettings
from fibkv.shape import Role
from fibkv.space import KeySpace


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
        stated, actual = [one.nbytes for one in contents.segments], [len(one) for one in container.sections]
        if stated != actual or len(stated) % 2:
            raise PageError(f"page container: expected sections of {stated} bytes for two roles alike, got {actual}")
        return contents


@dataclass(frozen=True, slots=True, eq=False)
class StoredSegment:
    """One segment of a stored page, where it lies.

    Attributes:
        header: of the segment.
        decision: of the policy that it was made under.
        codec: of its codes.
        space: of its keys, if they were taken to one.
        codes: the canonical bytes.
    """

    header: SegmentHeader
    decision: Decision
    codec: Codec
    space: KeySpace | None
    codes: memoryview

    def load(self) -> Segment:
        """The segment, its codes copied and checked."""
        segment = segment_from_bytes(self.header, self.decision, self.codec, self.codes)
        return segment if self.space is None else replace(segment, space=self.space)

    def vector(self, head: int, token: int) -> Tensor:
        """One vector ``[d]`` float32 of a head of the layer and a token of the page; reads no other."""
        group, step = head - self.header.heads[0], token - self.header.tokens[0]
        groups, tokens = (stop - start for start, stop in (self.header.heads, self.header.tokens))
        picked, offset = [], 0
        for one, two, all_ in zip(*(self.codec.layout(count) for count in (1, 2, tokens)), strict=True):
            # What the tokens of a group share comes once; else the bytes of one token follow those of another.
            stride = two.nbytes - one.nbytes
            start = offset + group * all_.nbytes + step * stride
            picked.append(bytes(self.codes[start : start + one.nbytes]))
            offset += groups * all_.nbytes
        codes = self.codec.from_bytes(memoryview(b"".join(picked)), 1, 1)
        out = torch.empty(1, 1, self.codec.head_dim)
        Segment((head, head + 1), (0, 1), self.decision, (), self.codec, codes, self.space).decode(out)
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

    @classmethod
    def open(cls, data: Bytes, settings: LayerSettings) -> StoredPage:
        """Opens a stored page for a layer. Reads its headers only.

        Args:
            data: the container.
            settings: of the layer that it belongs to.

        Raises:
            DigestMismatch: it is coded by other profiles than the layer's.
            PageError, ContractError: it is no page, of another layer, or its segments do not cover its rectangle once.
        """
        container = Container.parse(data, "page")
        contents = PageContents.of(container)
        header, half = contents.page, len(contents.segments) // 2
        kv_heads = settings.key_shape.kv_heads
        if header.layer != settings.layer:
            raise PageError(f"page: expected layer {settings.layer}, got {header.layer}")
        coders = (settings.keys, settings.values)
        for name, coder, stated in zip(
            ("key_profile", "value_profile"), coders, (header.key_profile, header.value_profile), strict=True
        ):
            require_digest(f"page of layer {header.layer} {name}", coder.profile_digest, stated)
        sides = []
        for coder, part in zip(coders, (slice(half), slice(half, None)), strict=True):
            headers = contents.segments[part]
            _check_inside(header, headers, kv_heads)
            pairs = zip(headers, container.sections[part], strict=True)
            sides.append(tuple(_segment(coder, header, one, codes) for one, codes in pairs))
            _check_cover(header, headers, kv_heads)
        return cls(header, sides[0], sides[1], container)

    def load(self) -> Page:
        """The page, checked against its digest, with its codes in memory of its own.

        Raises:
            DigestMismatch: the contents are not those that were sealed.
            PageError: codes that no encoder makes.
        """
        self.container.check_digest()
        keys, values = (tuple(segment.load() for segment in side) for side in (self.keys, self.values))
        head = self.header
        profiles = (head.key_profile, head.value_profile)
        return Page(head.layer, head.start, head.tokens, keys, values, *profiles, self.container.digest)

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
            (h0, h1), (t0, t1) = segment.header.heads, segment.header.tokens
            if h0 <= head < h1 and t0 <= token < t1:
                return segment.vector(head, token)
        raise ContractError("StoredPage.vector", f"a head and a token below {self.header.tokens}", (head, token))


def page_to_bytes(page: Page) -> bytes:
    """The container of a page.

    Raises:
        DigestMismatch: the page was damaged after it was sealed, and must not get a stored form.
    """
    segments = (*page.keys, *page.values)
    text = canonical_json({"page": page.header(), "segments": [segment.header() for segment in segments]})
    data = pack("page", text.encode(), [segment.to_bytes() for segment in segments])
    require_digest(f"Page(layer={page.layer}, start={page.start})", page.digest, Container.parse(data).digest)
    return data


def _segment(coder: RoleCoder, page: PageHeader, header: SegmentHeader, codes: memoryview) -> StoredSegment:
    """A segment whose header is one that the coder would give it, were the decision taken again."""
    if header.action not in ("compress", "keep_raw"):
        raise PageError(f"{_place(page)}: expected a segment that is compressed or raw, got {header.action!r}")
    fell_back = NOT_ENCODABLE in header.reasons
    reasons = tuple(reason for reason in header.reasons if reason != NOT_ENCODABLE)
    decision = Decision.model_validate({"action": header.action, "axis": header.axis, "reasons": reasons})
    run = Run(layers=(page.layer, page.layer + 1), heads=header.heads, tokens=header.tokens, decision=decision)
    coder.check_segment(_place(page), header, run)
    space = coder.space if decision.action == "compress" and not fell_back else None
    return StoredSegment(header, decision, coder.codec_of_segment(header, decision), space, codes)


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
