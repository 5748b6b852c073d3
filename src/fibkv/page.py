"""Pages: immutable spans of tokens, sealed once, shared by reference, never edited.

A page is a form (`fibkv.page_form`), codes for each segment of it, and a digest over both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fibkv.blocks import rounded
from fibkv.codecs import Codec
from fibkv.codes import Codes
from fibkv.contract import Contract, Total
from fibkv.digest import canonical_json, digest_bytes
from fibkv.errors import DigestMismatch
from fibkv.kernels.refusals import FLOAT16_MAX
from fibkv.packed import Held, Stored
from fibkv.page_form import PageForm, SegmentForm, SegmentHeader, shared
from fibkv.policy import Decision

PAGE_DOMAIN = "fib_quant_kv_page_v1"
# What a sealed page holds beside its codes: its digest (32 bytes), three counts and a page-table entry (8 each).
METADATA_NBYTES = 32 + 4 * 8


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
        form: which rectangle, and how it is coded.
        held: codes ``[heads, tokens, ...]``, in canonical order, in that of the kernels which read them, or as stored.
    """

    form: SegmentForm
    held: Held

    @property
    def codec(self) -> Codec:
        """How it is coded."""
        return self.form.codec

    @property
    def codes(self) -> Codes:
        """The codes in canonical order."""
        return self.held.canonical()

    def to_bytes(self) -> bytes | memoryview:
        """The canonical bytes of the codes."""
        return self.codec.to_bytes(self.held) if isinstance(self.held, Codes) else self.held.to_bytes()

    def decode(self, out: Tensor, *, implementation: str = "auto") -> None:
        """Decodes into ``out [heads, tokens, d]`` of any floating dtype."""
        space = self.form.space
        if space is None:
            self.codec.decode(self.codes, out=out, implementation=implementation)
            return
        vectors = space.leave(self.codec.decode(self.codes, implementation=implementation), slice(*self.form.heads))
        if out.dtype == torch.float16:
            # As in codecs: a code may decode a little above the key it stands for, not to infinity.
            vectors = vectors.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        out.copy_(vectors)

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
        start, stop = self.form.tokens
        stop = min(stop, tokens)
        if stop <= start:
            return None
        kept = self.codes.tokens(0, stop - start, lead=1)
        return Segment(self.form.cut(stop), kept.map(Tensor.clone))


def segment_from_bytes(header: SegmentHeader, decision: Decision, codec: Codec, data: memoryview) -> Segment:
    """The segment of a header and its canonical bytes, checked.

    Raises:
        PageError: bytes that no encoder makes of such a rectangle.
    """
    form = SegmentForm(header.heads, header.tokens, decision, header.reasons, codec)
    return Segment(form, codec.from_bytes(data, form.groups, form.length))


def decode_segments(segments: Iterable[Segment], out: Tensor, *, implementation: str = "auto") -> Tensor:
    """Decodes segments into ``out [heads, T, d]`` of any floating dtype, which they must cover; returns it."""
    for segment in segments:
        (h0, h1), (t0, t1) = segment.form.heads, segment.form.tokens
        segment.decode(out[h0:h1, t0:t1], implementation=implementation)
    return out


def segments_digest(header: Contract, segments: Sequence[Segment]) -> str:
    """Digest over a page's header, its segments' headers and the canonical bytes of their codes."""
    text = canonical_json([segment.form.header for segment in segments])
    return _digest(_header(canonical_json(header), text), (segment.to_bytes() for segment in segments))


def _digest(header: bytes, payload: Iterable[bytes | memoryview]) -> str:
    return digest_bytes(PAGE_DOMAIN, header, b"\0", *payload)


def _header(page: str, segments: str) -> bytes:
    """A page's header and those of its segments, each canonical JSON, as one."""
    return f'{{"page":{page},"segments":{segments}}}'.encode()


_as_json = lru_cache(maxsize=256)(canonical_json)


def stored_header(layer: int, start: int, form: PageForm, profiles: tuple[str, str]) -> bytes:
    """What the stored form of a page begins with: its header and those of its segments, canonical JSON.

    Args:
        layer: layer index.
        start: first token.
        form: of the page.
        profiles: digests of the keys' and the values' bound profiles.
    """
    # Written out: every page is asked for it when it is sealed, saved, loaded and checked.
    keys, values = map(_as_json, profiles)
    place = f'{{"layer":{layer},"start":{start},"tokens":{form.tokens},"key_profile":{keys},"value_profile":{values}}}'
    return _header(place, form.segments_json)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Page:
    """One layer, one batch row, one token span: keys and values with their digest, sealed when it is made.

    Attributes:
        layer: layer index.
        start: first token.
        form: its tokens and segments.
        held: codes of each of its segments, those of the keys first; see `Segment`.
        key_profile: digest of the keys' bound profile.
        value_profile: digest of the values' bound profile.
        digest: over all of the above.
    """

    layer: int
    start: int
    form: PageForm
    held: tuple[Held, ...]
    key_profile: str
    value_profile: str
    digest: str

    @classmethod
    def seal(
        cls,
        layer: int,
        span: tuple[int, int],
        keys: Sequence[Segment],
        values: Sequence[Segment],
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
        sides = (tuple([segment.form for segment in side]) for side in (keys, values))
        form = shared(PageForm(span[1] - span[0], *sides))
        unsealed = cls(layer, span[0], form, tuple([one.held for one in (*keys, *values)]), *profiles, digest="")
        return replace(unsealed, digest=unsealed._digest_of(payload))

    def __deepcopy__(self, memo: dict[int, object]) -> Page:
        return self  # immutable: copies of a cache share their pages

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.form.tokens

    @property
    def stop(self) -> int:
        """The token behind the last one."""
        return self.start + self.form.tokens

    @property
    def keys(self) -> tuple[Segment, ...]:
        """Segments of the keys."""
        return self.segments[: len(self.form.keys)]

    @property
    def values(self) -> tuple[Segment, ...]:
        """Segments of the values, on the same rectangles."""
        return self.segments[len(self.form.keys) :]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of the keys, then those of the values."""
        return tuple(map(Segment, self.form.segments, self.held))

    @property
    def run_key(self) -> tuple[PageForm, int | None]:
        """What must be equal for consecutive pages to be read together.

        A page with segments of some of its tokens (protected ones) is read on its own.
        """
        return self.form, None if self.form.is_whole else self.start

    @property
    def name(self) -> str:
        """What it is called where it is refused."""
        return f"layer {self.layer}, tokens {self.start}..{self.stop - 1}, {self.digest}"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, as they are held, and metadata. On a device they fill a block of its allocator."""
        nbytes = sum(codes.nbytes for codes in self.held)
        return METADATA_NBYTES + (nbytes if self.device.type == "cpu" else rounded(nbytes))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.held[0].device

    def header(self) -> PageHeader:
        """The page without its segments."""
        return PageHeader.model_validate({name: getattr(self, name) for name in PageHeader.model_fields})

    def stored_header(self) -> bytes:
        """See `stored_header`."""
        return stored_header(self.layer, self.start, self.form, (self.key_profile, self.value_profile))

    def compute_digest(self) -> str:
        """The digest of what the page holds now."""
        return self._digest_of(None)

    def _digest_of(self, payload: Iterable[bytes | memoryview] | None) -> str:
        octets = (segment.to_bytes() for segment in self.segments) if payload is None else payload
        return _digest(self.stored_header(), octets)

    def verify(self) -> None:
        """Checks the page against its digest.

        Raises:
            DigestMismatch: the page was damaged after sealing.
        """
        actual = self.compute_digest()
        if actual != self.digest:
            raise DigestMismatch(f"Page(layer={self.layer}, start={self.start})", self.digest, actual)

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
            [cut for segment in side if (cut := segment.cut(tokens)) is not None] for side in (self.keys, self.values)
        )
        profiles = (self.key_profile, self.value_profile)
        return Page.seal(self.layer, (self.start, self.start + tokens), keys, values, profiles)

    def to(self, device: torch.device) -> Page:
        """The page with its codes on a device; the same object if they are there already."""
        if self.device == device:
            return self
        return self.holding([codes.to(device) for codes in self.held])

    def raw_segments(self) -> Iterator[Segment]:
        """The segments that are kept raw, by decision or fallback."""
        return (segment for segment in self.segments if segment.form.header.raw_reason is not None)

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
        return self.holding([codes.canonical().map(Tensor.clone) for codes in self.held])

    def holding(self, held: Sequence[Held]) -> Page:
        """The page with the same codes in another order or place, for its keys' segments and then its values'."""
        return replace(self, form=self.form.on(held[0].device), held=tuple(held))
