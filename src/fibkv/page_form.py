"""What pages look like without their codes: which rectangle each segment covers, and how it is coded.

A *segment* is a rectangle (heads x tokens) of one role that one decision of the policy covers; the segments of a page
cover its rectangle exactly once. Heads and tokens that the policy protects are segments of the raw codec; everything
else is a segment of the profile's codec, or raw too where the codec cannot represent it and the profile allows that.

The pages of a cache have a handful of forms, which they share.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from fibkv.codecs import Codec
from fibkv.contract import Contract, Total
from fibkv.digest import canonical_json
from fibkv.errors import PageError
from fibkv.policy import Decision
from fibkv.space import KeySpace

# Reason of a raw segment that the policy wanted compressed and the codec refused.
NOT_ENCODABLE = "not_encodable"
# Reason of one that was measured and broke the quality budget.
OVER_BUDGET = "quality_budget"
FALLBACKS = frozenset({NOT_ENCODABLE, OVER_BUDGET})

Form = TypeVar("Form", "SegmentForm", "PageForm")
Rectangle = tuple[Codec, int, int]
"""Codec, heads and tokens of a segment."""


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


class _Form:
    """What many pages share: forms with equal fields are one object, so that they are compared by identity."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _joined, (type(self), *_fields(self))


@dataclass(frozen=True, eq=False)
class SegmentForm(_Form):
    """A segment without its codes, in the terms of the layer that it belongs to.

    Attributes:
        heads: half-open range of KV heads.
        tokens: half-open range of tokens, relative to the page's start.
        decision: what the policy said.
        reasons: why it is raw, or on which axis it is compressed.
        codec: how it is coded.
        space: what keys went through before they were coded, for all KV heads of the layer; None = nothing.
    """

    heads: tuple[int, int]
    tokens: tuple[int, int]
    decision: Decision
    reasons: tuple[str, ...]
    codec: Codec
    space: KeySpace | None = None

    @property
    def groups(self) -> int:
        """Number of heads."""
        return self.heads[1] - self.heads[0]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.tokens[1] - self.tokens[0]

    @cached_property
    def header(self) -> SegmentHeader:
        """What is hashed and stored of it."""
        return SegmentHeader(
            heads=self.heads,
            tokens=self.tokens,
            codec=self.codec.name,
            action=self.decision.action,
            axis=self.decision.axis,
            reasons=self.reasons,
            nbytes=self.codec.encoded_nbytes(self.groups, self.length),
        )

    def cut(self, tokens: int) -> SegmentForm:
        """The form of the part before token ``tokens`` of the page."""
        return shared(replace(self, tokens=(self.tokens[0], tokens)))

    def on(self, device: torch.device) -> SegmentForm:
        """The form of the segment with its codes on a device."""
        return self if self.space is None else shared(replace(self, space=space_on(self.space, device)))


@dataclass(frozen=True, eq=False)
class PageForm(_Form):
    """A page without its codes and its place.

    Attributes:
        tokens: number of them.
        keys: the segments of the keys.
        values: those of the values, on the same rectangles.

    Raises:
        PageError: keys and values differ in segments.
    """

    tokens: int
    keys: tuple[SegmentForm, ...]
    values: tuple[SegmentForm, ...]

    def __post_init__(self) -> None:
        keys, values = ([(one.heads, one.tokens) for one in side] for side in (self.keys, self.values))
        if keys != values:
            raise PageError(f"page: expected keys and values with the same segments, got {keys} and {values}")

    @cached_property
    def segments(self) -> tuple[SegmentForm, ...]:
        """Those of the keys, then those of the values."""
        return (*self.keys, *self.values)

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Of the segments: what must be equal for codes to be checked and put in order together."""
        return tuple((one.codec, one.groups, one.length) for one in self.segments)

    @cached_property
    def is_whole(self) -> bool:
        """Every segment has all of the tokens."""
        return all(one.tokens == (0, self.tokens) for one in self.segments)

    @cached_property
    def segments_json(self) -> str:
        """The headers of the segments as canonical JSON."""
        return canonical_json([one.header for one in self.segments])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the segments' codes, in canonical order."""
        return tuple(one.header.nbytes for one in self.segments)

    def on(self, device: torch.device) -> PageForm:
        """The form of the page with its codes on a device."""
        if all(one.space is None for one in self.segments):
            return self
        keys, values = (tuple([one.on(device) for one in side]) for side in (self.keys, self.values))
        return shared(replace(self, keys=keys, values=values))


_SHARED: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_SHARING = Lock()


def shared(form: Form) -> Form:
    """The form that all with equal fields share, with what is worked out of it: for as long as a page has it."""
    with _SHARING:
        found: Form = _SHARED.setdefault((type(form), *_fields(form)), form)
    return found


def _fields(form: Any) -> tuple[Any, ...]:
    return tuple([getattr(form, field.name) for field in fields(form)])


def _joined(kind: type[Form], *values: Any) -> Form:
    return shared(kind(*values))


# One copy for all pages of a layer.
@lru_cache(maxsize=256)
def space_on(space: KeySpace, device: torch.device) -> KeySpace:
    """A space on a device."""
    return space.to(device)
