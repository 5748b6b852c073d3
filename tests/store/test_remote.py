"""Stores on the network, against a real redis-server and a stand-in for S3, and what happens when these are gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer

from fibkv.errors import StoreError
from fibkv.prefix_save import save_prefix
from fibkv.store import DirectoryStore, Store, open_store
from fibkv.store.fsspec import LEFTOVER_SECONDS, FsspecStore
from fibkv.store.redis import RedisStore
from fibkv.store.retries import Retries
from tests.store.conformance import StoreConformance
from tests.store.prefixes import binding, fed
from tests.store.servers import redis_server, unused_port
from tests.store.test_prefixes import loaded, same

IDS = list(range(70))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), "--port", "0") as place:
        yield f"unix://{place}"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, object]]:
    """Options for fsspec, and the environment that boto reads."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        options: dict[str, object] = {"endpoint_url": f"http://{host}:{port}"}
        FsspecStore("s3://bucket/none", **options)._fs.mkdir("bucket")
        yield options
    server.stop()


class TestRedisStore(StoreConformance):
    @pytest.fixture
    def store(self, redis_url: str) -> Store:
        return RedisStore(redis_url, namespace=f"test-{uuid4().hex}")

    def test_namespaces_are_apart(self, redis_url: str) -> None:
        one, two = (RedisStore(redis_url, namespace=name) for name in ("one", "one_more"))
        one.put("pages/ab", b"1")
        assert not two.exists("pages/ab")
        assert list(two.list()) == []
        with pytest.raises(StoreError, match="namespace of letters"):
            RedisStore(redis_url, namespace="a*")

    def test_what_is_not_used_expires(self, redis_url: str) -> None:
        store = RedisStore(redis_url, namespace="expiring", ttl_seconds=1)
        store.put("pages/ab", b"1")
        store.put("pages/cd", b"1")
        for _ in range(7):
            time.sleep(0.2)
            store.touch(["pages/ab"])
        assert [entry.key for entry in store.list()] == ["pages/ab"]

    def test_foreign_keys_are_none_of_ours(self, store: RedisStore) -> None:
        store.put("pages/ab", b"1")
        for name in (b"pages", b"pages/A", b"pages/\xff"):
            store._client.set(store._prefix.encode() + name, b"x")
        assert [entry.key for entry in store.list()] == ["pages/ab"]

    def test_use_is_told(self, store: RedisStore) -> None:
        store.put("pages/ab", b"1")
        (entry,) = store.list("pages")
        assert abs(entry.used - time.time()) < 5


class TestMemoryFileSystem(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return FsspecStore(f"memory://{uuid4().hex}")


class TestLocalFileSystem(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"file://{tmp_path}/store")

    def test_it_is_a_directory_store_on_disk(self, store: FsspecStore, tmp_path: Path) -> None:
        store.put("pages/ab", b"one")
        assert DirectoryStore(tmp_path / "store").get("pages/ab") == b"one"
        assert repr(store) == f"FsspecStore('file://{tmp_path}/store')"

    def test_foreign_files_are_none_of_ours(self, store: FsspecStore, tmp_path: Path) -> None:
        store.put("pages/ab", b"1")
        for name in ("README", "pages/x.txt"):
            (tmp_path / "store" / name).write_text("x")
        assert [entry.key for entry in store.list()] == ["pages/ab"]

    def test_nothing_is_left_of_a_write_that_failed(self, tmp_path: Path) -> None:
        store = FsspecStore(f"file://{tmp_path}/store", attempts=1)
        (tmp_path / "store" / "pages" / "ab" / "x").mkdir(parents=True)  # a file cannot take its place
        moved = store._fs.mv
        store._fs.mv = lambda *_: (_ for _ in ()).throw(OSError("no"))
        try:
            with pytest.raises(StoreError, match="no"):
                store.put("pages/ab", b"one")
        finally:
            store._fs.mv = moved
        assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    def test_leftovers_of_killed_writers_go_at_the_next_start(self, store: FsspecStore, tmp_path: Path) -> None:
        class KilledError(BaseException): ...

        def kill(*_: object) -> None:
            raise KilledError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store._fs, "mv", kill)
            patch.setattr(store._fs, "rm_file", kill)
            for age in (2 * LEFTOVER_SECONDS, 0):
                patch.setattr("fibkv.store.fsspec.time", lambda age=age: time.time() - age)
                with pytest.raises(KilledError):
                    store.put("pages/ab", b"one")
        folder = tmp_path / "store" / ".tmp"
        assert len(list(folder.iterdir())) == 2
        assert list(store.list()) == []
        again = FsspecStore(store.url)
        assert len(list(folder.iterdir())) == 1
        again.put("pages/ab", b"two")
        assert store.get("pages/ab") == b"two"


class TestS3(StoreConformance):
    @pytest.fixture
    def store(self, s3: dict[str, object]) -> Store:
        return FsspecStore(f"s3://bucket/{uuid4().hex}", **s3)

    def test_writing_is_told(self, store: FsspecStore) -> None:
        store.put("pages/ab", b"1")
        (entry,) = store.list("pages")
        assert abs(entry.used - time.time()) < 60


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_prefixes_come_back_from_the_network(kind: str, redis_url: str, s3: dict[str, object]) -> None:
    store = open_store(redis_url) if kind == "redis" else open_store("s3://bucket/prefixes", **s3)
    assert save_prefix(store, binding(), fed(IDS), IDS).failure is None
    layers, loader = loaded(store, IDS)
    assert loader.failures == []
    assert same(layers, fed(IDS))


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_a_server_that_is_not_there_costs_a_miss(kind: str, s3: dict[str, object]) -> None:
    port = unused_port()
    if kind == "redis":
        store: Store = RedisStore(f"redis://127.0.0.1:{port}", attempts=2)
    else:
        store = FsspecStore("s3://bucket/x", attempts=2, **{**s3, "endpoint_url": f"http://127.0.0.1:{port}"})
    layers, loader = loaded(store, IDS)
    assert layers[0].length == 0
    assert "store" in loader.failures[0]
    assert save_prefix(store, binding(), fed(IDS), IDS).failure is not None


def test_a_server_that_does_not_answer_costs_its_timeout() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        store = RedisStore(f"redis://127.0.0.1:{mute.getsockname()[1]}", timeout_seconds=0.2, attempts=2)
        began = time.monotonic()
        with pytest.raises(StoreError, match="Timeout"):
            store.get("pages/ab")
        assert time.monotonic() - began < 3


def test_a_connection_that_breaks_once_is_tried_again(redis_url: str) -> None:
    store = RedisStore(redis_url, namespace="breaking")
    store.put("pages/ab", b"1")
    killer = RedisStore(redis_url)
    for client in killer._client.client_list():
        if client["id"] != str(killer._client.client_id()):
            killer._client.client_kill_filter(_id=client["id"])
    assert store.get("pages/ab") == b"1"


def test_attempts_end_and_what_cannot_get_better_is_not_tried_again() -> None:
    calls: list[int] = []

    def fail(error: BaseException) -> None:
        calls.append(1)
        raise error

    retries = Retries(3, lambda error: isinstance(error, TimeoutError))
    with pytest.raises(TimeoutError):
        retries(fail, TimeoutError())
    assert len(calls) == 3
    with pytest.raises(KeyError):
        retries(fail, KeyError())
    assert len(calls) == 4
    with pytest.raises(KeyboardInterrupt):
        Retries(3, lambda _: True)(fail, KeyboardInterrupt())
    assert len(calls) == 5


def test_places_are_opened_by_their_form(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(str(tmp_path / "x"), limit_nbytes=5), DirectoryStore)
    assert isinstance(open_store(redis_url, namespace="x"), RedisStore)
    assert isinstance(open_store(f"file://{tmp_path}/y"), FsspecStore)
    with pytest.raises(StoreError, match="store nonsense://x: ValueError"):
        open_store("nonsense://x")
    with pytest.raises(StoreError, match="expected a URL of redis"):
        RedisStore("http://x")
    for extra, place in (("redis", redis_url), ("remote", f"file://{tmp_path}/y")):
        module = {"redis": "redis", "remote": "fsspec"}[extra]
        monkeypatch.setitem(__import__("sys").modules, f"fibkv.store.{module}", None)
        with pytest.raises(StoreError, match=rf"pip install 'fibkv\[{extra}\]'"):
            open_store(place)
    assert os.path.isdir(tmp_path / "x")
