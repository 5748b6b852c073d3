"""What every store is: six operations on named bytes, and names that are safe everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fibkv.errors import ContractError, StoreError

ASIDE = "aside"
"""Folder of objects that did not stand a check."""

# No dots, no case, no empty parts: safe as a path, a Redis key and an S3 key alike. Any object can be set aside.
_KEY = re.compile(rf"({ASIDE}/)?[a-z0-9]{{1,64}}(/[a-z0-9]{{1,64}}){{1,4}}")
_FOLDER = re.compile(rf"|({ASIDE}/)?[a-z0-9]{{1,64}}(/[a-z0-9]{{1,64}}){{0,3}}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a store.

    Attributes:
        key: its name.
        nbytes: its size.
        used: when it was last written or touched, in seconds since 1970; 0.0 where the store does not know.
    """

    key: str
    nbytes: int
    used: float


@runtime_checkable
class Store(Protocol):
    """Named bytes. An object appears whole or not at all, and what it holds never changes under its name.

    Safe to use from many processes at once. Every method raises `StoreError` if the store fails, or if a name is not
    made of two to five parts of lower-case letters and digits with ``/`` between them; what is set aside has one more.
    """

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes an object, over one of the same name if there is one."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; it is no error if there is none."""
        ...

    def list(self, folder: str = "") -> Iterator[Entry]:
        """The objects whose names start with ``folder/``, in no order; all of them for the empty folder."""
        ...

    def touch(self, keys: Sequence[str]) -> None:
        """Counts objects as used now, one after another: a store with a limit loses the least recently used first."""
        ...


def check_store(field: str, store: object) -> None:
    """Refuses what is no store, such as the path of one.

    Raises:
        ContractError: it is none.
    """
    if not isinstance(store, Store):
        raise ContractError(field, "a store, such as fibkv.store.DirectoryStore(path)", store)


def check_key(key: str) -> str:
    """The name, if it can be one.

    Raises:
        StoreError: it cannot.
    """
    if not _KEY.fullmatch(key):
        raise StoreError(f"store key: expected two to five parts of a-z and 0-9 with '/' between them, got {key!r}")
    return key


def check_folder(folder: str) -> str:
    """The folder, if names can be in it.

    Raises:
        StoreError: they cannot.
    """
    if not _FOLDER.fullmatch(folder):
        raise StoreError(f"store folder: expected up to four parts of a-z and 0-9, got {folder!r}")
    return folder


def check_size(key: str, nbytes: int, limit_nbytes: int | None) -> None:
    """Refuses an object that alone is above the limit: nothing is thrown away for it.

    Raises:
        StoreError: it is.
    """
    if limit_nbytes is not None and nbytes > limit_nbytes:
        raise StoreError(f"store object {key}: expected at most the limit of {limit_nbytes} bytes, got {nbytes}")


def set_aside(store: Store, key: str) -> str:
    """Moves an object that did not stand a check to the folder `ASIDE`, where nothing reads it; returns its new name.

    Raises:
        StoreError: the store fails.
    """
    where = check_key(f"{ASIDE}/{key}")
    data = store.get(key)
    if data is not None:
        store.put(where, data)
        store.delete(key)
    return where
