"""Where a store keeps what belongs to prefixes: keys of roots, spans and ends."""

from __future__ import annotations

from fibkv.manifest import Binding, EndHeader
from fibkv.store.base import Entry


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


def end_place(entry: Entry) -> tuple[int, str]:
    """Length and name of a listed end."""
    *_, length, name = entry.key.split("/")
    return int(length), f"blake3:{name}"


def _hex(name: str) -> str:
    return name.removeprefix("blake3:")
