"""A store in a directory, for many processes of one machine or of several on a shared file system."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import time

from fibkv.errors import StoreError
from fibkv.files import write_bytes
from fibkv.store.base import Entry, check_folder, check_key, check_size

# A temporary file that nobody has written to for so long has lost its writer.
LEFTOVER_SECONDS = 600.0
# An eighth of the limit is freed beyond need, and written between two looks at the directory: a look is a walk.
SHARE = 8


class DirectoryStore:
    """Every object is a file of its name. Files appear whole: written beside their place and renamed.

    With a limit, the objects least recently used are removed. Each process counts what it writes itself and looks at
    the whole directory only when that could exceed the limit, so P processes may exceed it together by P/8.

    Args:
        path: of the directory; made, for this user alone, if absent.
        limit_nbytes: of all objects together; None = no limit.
        fsync: objects survive a loss of power once `put` has returned. Without it they survive the end of the
            process; damage is found by digests in any case.

    Raises:
        StoreError: the directory cannot be made or read.
    """

    def __init__(self, path: Path | str, *, limit_nbytes: int | None = None, fsync: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.limit_nbytes = limit_nbytes
        self.fsync = fsync
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_leftovers()
        except OSError as error:
            raise _failure(self.path, error) from error
        # Bytes that may be written before the next look at the directory.
        self._allowance = 0

    def __repr__(self) -> str:
        return f"DirectoryStore({str(self.path)!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.nbytes for entry in self.list())

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        try:
            return self._at(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failure(key, error) from error

    def put(self, key: str, data: bytes | memoryview) -> None:
        """See `Store`."""
        path, size = self._at(key), memoryview(data).nbytes
        check_size(key, size, self.limit_nbytes)
        try:
            self._make_room(size)
            write_bytes(path, data, fsync=self.fsync)
        except OSError as error:
            raise _failure(key, error) from error

    def exists(self, key: str) -> bool:
        """See `Store`."""
        return self._at(key).is_file()

    def delete(self, key: str) -> None:
        """See `Store`."""
        try:
            self._at(key).unlink(missing_ok=True)
        except OSError as error:
            raise _failure(key, error) from error

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Store`."""
        for path in _files(self.path / check_folder(folder)):
            key = path.relative_to(self.path).as_posix()
            # Another process may have removed it since; foreign files are none of ours.
            with suppress(FileNotFoundError, StoreError):
                state = path.stat()
                yield Entry(check_key(key), state.st_size, state.st_mtime)

    def touch(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        for key in keys:
            try:
                os.utime(self._at(key))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failure(key, error) from error

    def _at(self, key: str) -> Path:
        return self.path / check_key(key)

    def _make_room(self, nbytes: int) -> None:
        if self.limit_nbytes is None:
            return
        if nbytes > self._allowance:
            self._allowance = min(self._evict(nbytes, self.limit_nbytes), self.limit_nbytes // SHARE) + nbytes
        self._allowance -= nbytes

    def _evict(self, coming: int, limit: int) -> int:
        """Removes the least recently used objects if ``coming`` bytes do not fit; returns what is free beyond them."""
        entries = sorted(self.list(), key=lambda entry: entry.used)
        held = sum(entry.nbytes for entry in entries)
        allowed = limit - coming
        if held > allowed:
            allowed = max(0, allowed - limit // SHARE)
        for entry in entries:
            if held <= allowed:
                break
            self.delete(entry.key)
            held -= entry.nbytes
        return limit - coming - held

    def _remove_leftovers(self) -> None:
        for path in _files(self.path, temporary=True):
            with suppress(FileNotFoundError):
                if time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()


def _files(path: Path, *, temporary: bool = False) -> Iterator[Path]:
    """The files under a directory: the objects, or what is being written or was left behind."""
    for parent, _, names in os.walk(path):
        yield from (Path(parent, name) for name in names if name.startswith(".") == temporary)


def _failure(what: object, error: OSError) -> StoreError:
    return StoreError(f"directory store, {what}: {error}")
