"""Where a store keeps what belongs to prefixes: keys of roots, spans and ends."""

from __future__ import annotations

import re

from fibkv.manifest import Binding, EndHeader
from fibkv.store.base import Entry

_END = re.compile(r"ends/[0-9a-f]{64}/(?P<length>[0-9]{1,18})/(?P<name>[0-9a-f]{64})")


def root_key(binding: Binding) -> str:
    """Of the root of a binding."""
    return f"roots/{_hex(binding.name)}"


def span_key(name: str) -> str:
    """Of the span that ends a prefix."""
    return f"spans/{_hex(name)}"


def end_key(header: EndHeader) -> str:
    """Of an end: it tells its length, so that only a prompt's beginnings of such lengths need be hashed."""
    return f"{ends_folder(header.previous)}/{header.length}/{_hex(header.name)}"


def ends_folder(previous: str) -> str:
    """Of all ends behind one span."""
    return f"ends/{_hex(previous)}"


def end_place(entry: Entry) -> tuple[int, str] | None:
    """Length and name of a listed end; None for an object that is none."""
    place = _END.fullmatch(entry.key)
    return None if place is None else (int(place["length"]), f"blake3:{place['name']}")


def _hex(name: str) -> str:
    return name.removeprefix("blake3:")
