"""A store in Redis or Valkey, for processes on many machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import time
from typing import Any, TypeVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from fibkv.errors import StoreError
from fibkv.store.base import Entry, check_folder, check_key
from fibkv.store.retries import Retries

Answer = TypeVar("Answer")

# Keys that one round trip asks about.
BATCH = 1000


class RedisStore:
    """Every object is a string under ``<namespace>:<key>``.

    The server's ``maxmemory`` with ``allkeys-lru`` is the limit: what was least recently used goes first. Safe to use
    from many threads.

    Args:
        url: such as ``redis://localhost:6379/0``, ``rediss://...`` or ``unix:///run/redis.sock``.
        namespace: of this store in the database; letters, digits, ``-`` and ``_``.
        ttl_seconds: objects that were not used for so long are removed; None = never.
        timeout_seconds: for connecting and for every answer.
        attempts: at connections that fail or time out.

    Raises:
        StoreError: a URL or namespace that cannot be. The server is first asked when it is first used.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "fibkv",
        ttl_seconds: int | None = None,
        timeout_seconds: float = 5.0,
        attempts: int = 3,
    ) -> None:
        if not namespace.replace("-", "").replace("_", "").isalnum():
            raise StoreError(f"redis store: expected a namespace of letters, digits, - and _, got {namespace!r}")
        self._prefix = f"{namespace}:"
        self._ttl = ttl_seconds
        self._retries = Retries(attempts, lambda error: isinstance(error, RedisConnectionError | RedisTimeoutError))
        try:
            self._client = Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),  # `Retries` does it, and says how often
            )
        except ValueError as error:
            raise StoreError(f"redis store: expected a URL of redis, rediss or unix, got {url!r}") from error

    def get(self, key: str) -> bytes | None:
        """See `Store`."""
        return self._ask(self._client.get, self._at(key))  # type: ignore[return-value]  # it may be asynchronous

    def put(self, key: str, data: bytes | memoryview) -> None:
        """See `Store`."""
        self._ask(lambda: self._client.set(self._at(key), data, ex=self._ttl))

    def exists(self, key: str) -> bool:
        """See `Store`."""
        return bool(self._ask(self._client.exists, self._at(key)))

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._ask(self._client.unlink, self._at(key))

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Store`. Walks over all keys of the database."""
        pattern = f"{self._prefix}{check_folder(folder)}{'/' if folder else ''}*"
        keys = sorted(set(self._ask(lambda: list(self._client.scan_iter(pattern, count=BATCH)))))
        for start in range(0, len(keys), BATCH):
            yield from self._entries(keys[start : start + BATCH])

    def touch(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        names = [self._at(key) for key in keys]
        for start in range(0, len(names), BATCH):
            self._ask(self._touch, names[start : start + BATCH])

    def _touch(self, names: Sequence[str]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                if self._ttl is None:
                    pipeline.touch(name)
                else:
                    pipeline.expire(name, self._ttl)
            pipeline.execute()

    def _entries(self, names: Sequence[bytes]) -> Iterator[Entry]:
        def ask() -> list[Any]:
            with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.object("idletime", name)  # before anything else, which would count as use
                    pipeline.strlen(name)
                return pipeline.execute(raise_on_error=False)

        answers = self._ask(ask)
        for name, idle, size in zip(names, answers[::2], answers[1::2], strict=True):
            # Gone since; or the server keeps frequencies and not times; or it is no string and none of ours.
            if isinstance(size, int) and idle is not None:
                used = time() - idle if isinstance(idle, int) else 0.0
                with suppress(StoreError, UnicodeDecodeError):
                    yield Entry(check_key(name.decode().removeprefix(self._prefix)), size, used)

    def _at(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _ask(self, call: Callable[..., Answer], *args: object) -> Answer:
        try:
            return self._retries(call, *args)
        except RedisError as error:
            raise StoreError(f"redis store: {type(error).__name__}: {error}") from error
