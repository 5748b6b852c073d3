"""A store in the memory of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from time import time

from fibkv.store.base import Entry, check_folder, check_key, check_size


class MemoryStore:
    """Objects in a dictionary, in the order of their last use. Safe to use from many threads.

    Args:
        limit_nbytes: of all objects together; None = no limit.
    """

    def __init__(self, limit_nbytes: int | None = None) -> None:
        self.limit_nbytes = limit_nbytes
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._nbytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return self._nbytes

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        found = self._objects.get(check_key(key))
        return None if found is None else found[0]

    def put(self, key: str, data: bytes | memoryview) -> None:
        """See `Store`; the least recently used objects make room."""
        check_key(key)
        size = memoryview(data).nbytes
        check_size(key, size, self.limit_nbytes)
        with self._lock:
            self._remove(key)
            while self.limit_nbytes is not None and self._nbytes + size > self.limit_nbytes:
                self._remove(next(iter(self._objects)))
            self._objects[key] = (bytes(data), time())
            self._nbytes += size

    def exists(self, key: str) -> bool:
        """See `Store`."""
        return check_key(key) in self._objects

    def delete(self, key: str) -> None:
        """See `Store`."""
        check_key(key)
        with self._lock:
            self._remove(key)

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Store`."""
        prefix = f"{folder}/" if check_folder(folder) else ""
        with self._lock:
            found = [Entry(key, len(data), used) for key, (data, used) in self._objects.items()]
        return (entry for entry in found if entry.key.startswith(prefix))

    def touch(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        for key in keys:
            with self._lock:
                if (held := self._objects.pop(check_key(key), None)) is not None:
                    self._objects[key] = (held[0], time())

    def _remove(self, key: str) -> None:
        data, _ = self._objects.pop(key, (b"", 0.0))
        self._nbytes -= len(data)
