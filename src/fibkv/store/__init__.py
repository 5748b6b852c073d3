"""Stores: named bytes that outlive the process. They know nothing of pages.

`memory` and `directory` are always there; `redis` and `fsspec` need the extras of the same names.
"""

from __future__ import annotations

from fibkv.store.base import Entry, Store, set_aside
from fibkv.store.directory import DirectoryStore
from fibkv.store.memory import MemoryStore

__all__ = ["DirectoryStore", "Entry", "MemoryStore", "Store", "set_aside"]
