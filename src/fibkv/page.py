"""Pages: immutable spans of tokens, sealed once, shared by reference, never edited.

A *segment* is a rectangle (heads x tokens) of one role that one decision of the policy covers; the segments of a page
cover its rectangle exactly once. Heads and tokens that the policy protects are segments of the raw codec; everything
else is a segment of the profile's codec, or raw too where the codec cannot represent it and the profile allows that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fibkv.blocks import rounded
from fibkv.codecs import Codec
from fibkv.codes import Codes
from fibkv.contract import Contract, Total
from fibkv.digest import canonical_json, digest_bytes
from fibkv.errors import DigestMismatch, PageError
from fibkv.kernels.refusals import FLOAT16_MAX
from fibkv.packed import Held, Stored
from fibkv.policy import Decision
from fibkv.space import KeySpace

PAGE_DOMAIN = "fib_quant_kv_page_v1"
# Reason of a raw segment that the policy wanted compressed and the codec refused.
NOT_ENCODABLE = "not_encodable"
# Reason of one that was measured and broke the quality budget.
OVER_BUDGET = "quality_budget"
FALLBACKS = frozenset({NOT_ENCODABLE, OVER_BUDGET})
# What a sealed page holds beside its codes: its digest (32 bytes), three counts and a page-table entry (8 each).
METADATA_NBYTES = 32 + 4 * 8


class SegmentHeader(Contract):
    """What is known of a segment without its codes: part of a page's digest and of its stored form."""

    heads: tuple[int, int]
    tokens: tuple[int, int]
    codec: str
    action: str
    axis: str
    reasons: tuple[str, ...]
    nbytes: Total

    @property
    def num_vectors(self) -> int:
        """Vectors in the rectangle."""
        return (self.heads[1] - self.heads[0]) * (self.tokens[1] - self.tokens[0])

    @property
    def raw_reason(self) -> str | None:
        """Why the vectors are stored raw, by decision or fallback; None if they are compressed."""
        if fell_back := FALLBACKS.intersection(self.reasons):
            return min(fell_back)
        return None if self.action == "compress" else self.reasons[0]


class PageHeader(Contract):
    """Where a page belongs, and by which profiles it is coded: part of its digest and of its stored form."""

    layer: Total
    start: Total
    tokens: Total
    key_profile: str
    value_profile: str


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One rectangle of one role of one page.

    Attributes:
        heads: half-open range of KV heads.
        tokens: half-open range of tokens, relative to the page's start.
        decision: what the policy said.
        reasons: why it is raw, or on which axis it is compressed.
        codec: how it is coded.
        held: codes ``[heads, tokens, ...]``, in canonical order, in that of the kernels which read them, or as stored.
        space: what keys went through before they were coded, for all KV heads of the layer; None = nothing.
    """

    heads: tuple[int, int]
    tokens: tuple[int, int]
    decision: Decision
    reasons: tuple[str, ...]
    codec: Codec
    held: Held
    space: KeySpace | None = None

    @property
    def codes(self) -> Codes:
        """The codes in canonical order."""
        return self.held.canonical()

    def header(self) -> SegmentHeader:
        """The segment without its codes."""
        return _segment_header(*self._form)

    @property
    def _form(self) -> _SegmentForm:
        return self.heads, self.tokens, self.decision, self.reasons, self.codec

    def to_bytes(self) -> bytes | memoryview:
        """The canonical bytes of the codes."""
        return self.codec.to_bytes(self.held) if isinstance(self.held, Codes) else self.held.to_bytes()

    def decode(self, out: Tensor, *, implementation: str = "auto") -> None:
        """Decodes into ``out [heads, tokens, d]`` of any floating dtype."""
        if self.space is None:
            self.codec.decode(self.codes, out=out, implementation=implementation)
            return
        vectors = self.space.leave(self.codec.decode(self.codes, implementation=implementation), slice(*self.heads))
        if out.dtype == torch.float16:
            # As in codecs: a code may decode a little above the key it stands for, not to infinity.
            vectors = vectors.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        out.copy_(vectors)

    def to(self, device: torch.device) -> Segment:
        """The segment on a device."""
        return replace(self, held=self.held.to(device), space=None if self.space is None else self.space.to(device))

    def reverse_tokens(self) -> None:
        """Reverses the token order of the payload, in place; doing it twice restores it."""
        codes = self.codes
        *_, (_, payload) = codes.named()
        raw = payload.view(torch.uint8)
        raw.copy_(raw.flip(1))
        assert not isinstance(self.held, Stored)  # a cache has its codes in memory of its own
        self.held.store(codes)

    def cut(self, tokens: int) -> Segment | None:
        """The segment's part before token ``tokens`` of its page, copied, or None if nothing is left."""
        stop = min(self.tokens[1], tokens)
        if stop <= self.tokens[0]:
            return None
        kept = self.codes.tokens(0, stop - self.tokens[0], lead=1)
        return replace(self, tokens=(self.tokens[0], stop), held=kept.map(Tensor.clone))


def segment_from_bytes(header: SegmentHeader, decision: Decision, codec: Codec, data: memoryview) -> Segment:
    """The segment of a header and its canonical bytes, checked.

    Raises:
        PageError: bytes that no encoder makes of such a rectangle.
    """
    groups, tokens = (stop - start for start, stop in (header.heads, header.tokens))
    codes = codec.from_bytes(data, groups, tokens)
    return Segment(header.heads, header.tokens, decision, header.reasons, codec, codes)


def decode_segments(segments: Iterable[Segment], out: Tensor, *, implementation: str = "auto") -> Tensor:
    """Decodes segments into ``out [heads, T, d]`` of any floating dtype, which they must cover; returns it."""
    for segment in segments:
        (h0, h1), (t0, t1) = segment.heads, segment.tokens
        segment.decode(out[h0:h1, t0:t1], implementation=implementation)
    return out


_SegmentForm = tuple[tuple[int, int], tuple[int, int], Decision, tuple[str, ...], Codec]


# The pages of a cache have a handful of forms; every page is asked for its own when it is hashed and when it is stored.
@lru_cache(maxsize=256)
def _segment_header(
    heads: tuple[int, int], tokens: tuple[int, int], decision: Decision, reasons: tuple[str, ...], codec: Codec
) -> SegmentHeader:
    return SegmentHeader(
        heads=heads,
        tokens=tokens,
        codec=codec.name,
        action=decision.action,
        axis=decision.axis,
        reasons=reasons,
        nbytes=codec.encoded_nbytes(heads[1] - heads[0], tokens[1] - tokens[0]),
    )


@lru_cache(maxsize=256)
def _stored_form(forms: tuple[_SegmentForm, ...]) -> tuple[str, tuple[int, ...]]:
    """Canonical JSON of segments' headers, and the bytes of their codes."""
    headers = [_segment_header(*form) for form in forms]
    return canonical_json(headers), tuple(header.nbytes for header in headers)


_as_json = lru_cache(maxsize=256)(canonical_json)


def segments_digest(header: Contract, segments: Sequence[Segment]) -> str:
    """Digest over a page's header, its segments' headers and the canonical bytes of their codes."""
    return _digest(canonical_json(header), segments)


def _digest(header: str, segments: Sequence[Segment], payload: Iterable[bytes | memoryview] | None = None) -> str:
    text, _ = _headers(header, segments)
    octets = (segment.to_bytes() for segment in segments) if payload is None else payload
    return digest_bytes(PAGE_DOMAIN, text, b"\0", *octets)


# One copy for all pages of a layer.
@lru_cache(maxsize=256)
def space_on(space: KeySpace, device: torch.device) -> KeySpace:
    """A space on a device."""
    return space.to(device)


def _headers(header: str, segments: Sequence[Segment]) -> tuple[bytes, tuple[int, ...]]:
    """A page's header and its segments' ones as canonical JSON, and the bytes of the segments' codes."""
    text, sizes = _stored_form(tuple(segment._form for segment in segments))
    return f'{{"page":{header},"segments":{text}}}'.encode(), sizes


@dataclass(frozen=True, eq=False)
class Page:
    """One layer, one batch row, one token span: keys and values with their digest, sealed when it is made.

    Attributes:
        layer: layer index.
        start: first token.
        tokens: number of tokens.
        keys: segments of the keys.
        values: segments of the values, on the same rectangles.
        key_profile: digest of the keys' bound profile.
        value_profile: digest of the values' bound profile.
        digest: over all of the above.
    """

    layer: int
    start: int
    tokens: int
    keys: tuple[Segment, ...]
    values: tuple[Segment, ...]
    key_profile: str
    value_profile: str
    digest: str

    def __post_init__(self) -> None:
        if [(s.heads, s.tokens) for s in self.keys] != [(s.heads, s.tokens) for s in self.values]:
            raise PageError(f"page of layer {self.layer} at token {self.start}: keys and values differ in segments")

    @classmethod
    def seal(
        cls,
        layer: int,
        span: tuple[int, int],
        keys: tuple[Segment, ...],
        values: tuple[Segment, ...],
        profiles: tuple[str, str],
        payload: Iterable[bytes | memoryview] | None = None,
    ) -> Page:
        """A page with the digest of what it holds now.

        Args:
            layer: layer index.
            span: half-open range of tokens.
            keys: segments of the keys.
            values: segments of the values.
            profiles: digests of the keys' and the values' bound profiles.
            payload: the canonical bytes of the codes in order, if they are at hand; None = they are taken from them.

        Raises:
            PageError: keys and values differ in segments.
        """
        unsealed = cls(layer, span[0], span[1] - span[0], keys, values, *profiles, digest="")
        return replace(unsealed, digest=_digest(unsealed._header_json, (*keys, *values), payload))

    def __deepcopy__(self, memo: dict[int, object]) -> Page:
        return self  # immutable: copies of a cache share their pages

    def header(self) -> PageHeader:
        """The page without its segments."""
        return PageHeader.model_validate({name: getattr(self, name) for name in PageHeader.model_fields})

    def headers(self) -> tuple[bytes, tuple[int, ...]]:
        """What its stored form begins with, canonical JSON, and the bytes of the codes of each segment."""
        return _headers(self._header_json, (*self.keys, *self.values))

    @property
    def _header_json(self) -> str:
        # Written out: every page is asked for it when it is sealed, saved and checked.
        return (
            f'{{"layer":{self.layer},"start":{self.start},"tokens":{self.tokens},'
            f'"key_profile":{_as_json(self.key_profile)},"value_profile":{_as_json(self.value_profile)}}}'
        )

    def compute_digest(self) -> str:
        """The digest of what the page holds now."""
        return _digest(self._header_json, (*self.keys, *self.values))

    def verify(self) -> None:
        """Checks the page against its digest.

        Raises:
            DigestMismatch: the page was damaged after sealing.
        """
        actual = self.compute_digest()
        if actual != self.digest:
            raise DigestMismatch(f"Page(layer={self.layer}, start={self.start})", self.digest, actual)

    @cached_property
    def form(self) -> tuple[object, ...]:
        """What must be equal for consecutive pages to be read together: lengths, rectangles, codecs, key spaces.

        A page with segments of some of its tokens (protected ones) has a form of its own.
        """
        segments = (*self.keys, *self.values)
        whole = all(segment.tokens == (0, self.tokens) for segment in segments)
        rectangles = tuple((s.heads, s.tokens, s.codec, s.space) for s in segments)
        return (self.tokens, None if whole else self.start, rectangles)

    @property
    def name(self) -> str:
        """What it is called where it is refused."""
        return f"layer {self.layer}, tokens {self.start}..{self.stop - 1}, {self.digest}"

    @property
    def stop(self) -> int:
        """The token behind the last one."""
        return self.start + self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of codes, as they are held, and metadata. On a device they fill a block of its allocator."""
        nbytes = sum(segment.held.nbytes for segment in (*self.keys, *self.values))
        return METADATA_NBYTES + (nbytes if self.device.type == "cpu" else rounded(nbytes))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.keys[0].held.device

    def cut(self, tokens: int) -> Page | None:
        """The page's first ``tokens`` tokens: itself, a shorter page with the same codes bit for bit, or nothing.

        Raises:
            DigestMismatch: the page was damaged after sealing, and must not get a new digest.
        """
        if tokens <= 0:
            return None
        if tokens >= self.tokens:
            return self
        self.verify()
        keys, values = (
            tuple(cut for segment in side if (cut := segment.cut(tokens)) is not None)
            for side in (self.keys, self.values)
        )
        profiles = (self.key_profile, self.value_profile)
        return Page.seal(self.layer, (self.start, self.start + tokens), keys, values, profiles)

    def to(self, device: torch.device) -> Page:
        """The page with its codes on a device; the same object if they are there already."""
        if all(segment.held.device == device for segment in (*self.keys, *self.values)):
            return self
        keys, values = (tuple(segment.to(device) for segment in side) for side in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def raw_segments(self) -> Iterator[Segment]:
        """The segments that are kept raw, by decision or fallback."""
        return (segment for segment in (*self.keys, *self.values) if segment.header().raw_reason is not None)

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """For poison tests: damages the keys in memory and restores them on exit.

        Their payload is put in reverse token order, so that every code stays valid and every key wrong.
        """
        for segment in self.keys:
            segment.reverse_tokens()
        try:
            yield
        finally:
            for segment in self.keys:
                segment.reverse_tokens()

    def copied(self) -> Page:
        """The page with a copy of its codes, in canonical order."""
        return self.holding([segment.codes.map(Tensor.clone) for segment in (*self.keys, *self.values)])

    def holding(self, held: Sequence[Held]) -> Page:
        """The page with the same codes in another order or place, for its keys' segments and then its values'."""
        segments = [
            replace(old, held=new, space=None if old.space is None else space_on(old.space, new.device))
            for old, new in zip((*self.keys, *self.values), held, strict=True)
        ]
        return replace(self, keys=tuple(segments[: len(self.keys)]), values=tuple(segments[len(self.keys) :]))
