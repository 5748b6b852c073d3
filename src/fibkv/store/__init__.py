"""Stores: named bytes that outlive the process. They know nothing of pages.

`memory` and `directory` are always there; `redis` needs the extra of that name, `fsspec` the extra ``remote``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fibkv.errors import StoreError
from fibkv.store.base import Entry, Store, set_aside
from fibkv.store.directory import DirectoryStore
from fibkv.store.memory import MemoryStore

__all__ = ["DirectoryStore", "Entry", "MemoryStore", "Store", "open_store", "set_aside"]

_REDIS = ("redis", "rediss", "unix")


def open_store(place: str, **options: Any) -> Store:
    """The store at a place.

    Args:
        place: a directory; a URL of Redis (redis, rediss, unix); or a URL that fsspec knows (s3, gs, file, ...).
        **options: of `DirectoryStore`, `fibkv.store.redis.RedisStore` or `fibkv.store.fsspec.FsspecStore`.

    Raises:
        StoreError: there can be no such store, or the extra that it needs is not installed.
    """
    scheme, found, _ = place.partition("://")
    if not found:
        return DirectoryStore(place, **options)
    module, extra, name = ("redis", "redis", "RedisStore") if scheme in _REDIS else ("fsspec", "remote", "FsspecStore")
    try:
        store: Store = getattr(import_module(f"fibkv.store.{module}"), name)(place, **options)
    except ImportError as error:
        raise StoreError(f"{place}: {error}; pip install 'fibkv[{extra}]'") from error
    return store
