"""A store wherever fsspec reaches: S3, Google Cloud Storage, Azure, SFTP, a local directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from time import time
from typing import Any, TypeVar
from uuid import uuid4

from fsspec.core import url_to_fs

from fibkv.errors import StoreError
from fibkv.store.base import Entry, check_folder, check_key
from fibkv.store.retries import Retries

Answer = TypeVar("Answer")

# Where an object that is written appears whole. Elsewhere it is written to a folder that no key can name, and moved.
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"})
_S3 = frozenset({"s3", "s3a"})
_TEMPORARY = ".tmp"
# A temporary file that is so old has lost its writer.
LEFTOVER_SECONDS = 3600.0
# By what name file systems know when an object was written.
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


class FsspecStore:
    """Every object is a file or object of its name under a URL.

    There is no limit here and `touch` does nothing: what is old is the business of the bucket's lifecycle rules.

    Args:
        url: such as ``s3://bucket/folder``, ``gs://...``, ``sftp://host/folder``, ``file:///folder``.
        attempts: at operations that fail; an object that is not there, or not allowed, is no failure.
        timeout_seconds: for connecting and for every answer; of S3, others have options of their own.
        **options: of the file system, for fsspec.

    Raises:
        StoreError: fsspec does not know the URL, or the package behind it is missing.
    """

    def __init__(self, url: str, *, attempts: int = 3, timeout_seconds: float = 10.0, **options: Any) -> None:
        scheme = url.split("://", maxsplit=1)[0]
        if scheme in _S3:
            once = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": {"max_attempts": 1}}
            options = {**options, "config_kwargs": {**once, **options.get("config_kwargs", {})}}
        self.url = url
        self._is_whole = scheme in _WHOLE
        self._retries = Retries(attempts, lambda error: not isinstance(error, FileNotFoundError | PermissionError))
        # Listings must be those of now: other processes write too.
        self._fs, self._root = self._ask(lambda: url_to_fs(url, use_listings_cache=False, **options))
        self._temporary = f"{self._root}/{_TEMPORARY}"
        if not self._is_whole:
            self._ask(self._remove_leftovers)

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        try:
            return bytes(self._ask(self._fs.cat_file, self._at(key)))
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes | memoryview) -> None:
        """See `Store`."""
        path = self._at(key)
        self._ask(self._write, path, bytes(data))

    def exists(self, key: str) -> bool:
        """See `Store`."""
        return bool(self._ask(self._fs.isfile, self._at(key)))

    def delete(self, key: str) -> None:
        """See `Store`."""
        try:
            self._ask(self._fs.rm_file, self._at(key))
        except FileNotFoundError:
            return

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Store`."""
        where = f"{self._root}/{check_folder(folder)}".rstrip("/")
        try:
            found: dict[str, dict[str, Any]] = self._ask(lambda: self._fs.find(where, detail=True))
        except FileNotFoundError:
            return
        for path, info in found.items():
            # Foreign files are none of ours.
            with suppress(StoreError):
                yield Entry(check_key(path.removeprefix(self._root).strip("/")), int(info["size"]), _written(info))

    def touch(self, keys: Sequence[str]) -> None:
        """See `Store`: nothing but the names is looked at."""
        for key in keys:
            check_key(key)

    def _write(self, path: str, data: bytes) -> None:
        if self._is_whole:
            self._fs.pipe_file(path, data)
            return
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.makedirs(self._temporary, exist_ok=True)
        # Not every file system knows when a file was written.
        temporary = f"{self._temporary}/{int(time())}-{uuid4().hex}"
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, path)
        finally:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)

    def _remove_leftovers(self) -> None:
        """What writers that were killed have left."""
        if not self._fs.isdir(self._temporary):
            return
        for path in self._fs.ls(self._temporary, detail=False):
            began, _, _ = path.rpartition("/")[2].partition("-")
            if began.isdecimal() and time() - int(began) > LEFTOVER_SECONDS:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def _at(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _ask(self, call: Callable[..., Answer], *args: object) -> Answer:
        try:
            return self._retries(call, *args)
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise StoreError(f"store {self.url}: {type(error).__name__}: {error}") from error


def _written(info: dict[str, Any]) -> float:
    found = next((info[name] for name in _TIMES if info.get(name) is not None), 0.0)
    return found.timestamp() if isinstance(found, datetime) else float(found)
