"""What every store must do: a class that each store's tests take over."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest

from fibkv.errors import StoreError
from fibkv.store import Entry, Store, set_aside

NAMES = ["a", "/a/b", "a//b", "a/b/", "a/../b", "a/.b", "A/b", "a/b c", "a/b\n", "a/b/c/d/e/f", "a/" + "b" * 65, ""]


class StoreConformance:
    """Subclasses give `store`, an empty one, and say whether it knows the order of use."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError

    def test_what_is_put_is_got(self, store: Store) -> None:
        store.put("pages/ab", b"one")
        store.put("ends/cd/ef", memoryview(b"xtwox")[1:-1])
        store.put("pages/empty", b"")
        assert store.get("pages/ab") == b"one"
        assert store.get("ends/cd/ef") == b"two"
        assert store.get("pages/empty") == b""
        assert isinstance(store.get("ends/cd/ef"), bytes)

    def test_what_is_not_there_is_no_error(self, store: Store) -> None:
        assert store.get("pages/ab") is None
        assert not store.exists("pages/ab")
        store.delete("pages/ab")
        store.touch(["pages/ab"])
        assert list(store.list()) == []
        assert list(store.list("pages")) == []

    def test_a_folder_is_no_object(self, store: Store) -> None:
        store.put("ends/cd/ef", b"1")
        assert not store.exists("ends/cd")

    def test_an_object_is_replaced_and_removed(self, store: Store) -> None:
        store.put("pages/ab", b"one")
        store.put("pages/ab", b"another")
        assert store.get("pages/ab") == b"another"
        assert [(entry.key, entry.nbytes) for entry in store.list()] == [("pages/ab", 7)]
        store.delete("pages/ab")
        assert not store.exists("pages/ab")
        assert store.get("pages/ab") is None
        assert list(store.list()) == []

    def test_folders_are_listed(self, store: Store) -> None:
        keys = ["pages/ab", "pages/cd", "pagesx/ef", "ends/ab/cd", "ends/ab/ef", "ends/abc/ef"]
        for index, key in enumerate(keys):
            store.put(key, bytes(index))
        assert {(entry.key, entry.nbytes) for entry in store.list()} == {(key, i) for i, key in enumerate(keys)}
        assert {entry.key for entry in store.list("pages")} == {"pages/ab", "pages/cd"}
        assert {entry.key for entry in store.list("ends/ab")} == {"ends/ab/cd", "ends/ab/ef"}
        assert all(isinstance(entry, Entry) for entry in store.list())

    @pytest.mark.parametrize("name", NAMES)
    def test_names_are_safe_everywhere(self, store: Store, name: str) -> None:
        for call in (
            store.get,
            store.exists,
            store.delete,
            lambda name: store.put(name, b""),
            lambda n: store.touch([n]),
        ):
            with pytest.raises(StoreError, match="store key: expected two to five parts"):
                call(name)
        if name not in ("", "a"):
            with pytest.raises(StoreError, match="store folder"):
                list(store.list(name))

    def test_a_damaged_object_is_set_aside(self, store: Store) -> None:
        store.put("ends/ab/cd", b"damaged")
        assert set_aside(store, "ends/ab/cd") == "aside/ends/ab/cd"
        assert not store.exists("ends/ab/cd")
        assert store.get("aside/ends/ab/cd") == b"damaged"
        set_aside(store, "ends/ab/cd")  # another process was first
        assert store.get("aside/ends/ab/cd") == b"damaged"

    def test_an_object_of_the_longest_name_is_set_aside(self, store: Store) -> None:
        store.put("a/b/c/d/e", b"damaged")
        assert set_aside(store, "a/b/c/d/e") == "aside/a/b/c/d/e"
        assert [entry.key for entry in store.list("aside/a/b/c/d")] == ["aside/a/b/c/d/e"]
        assert [entry.key for entry in store.list()] == ["aside/a/b/c/d/e"]
        with pytest.raises(StoreError, match="store key: expected two to five parts"):
            set_aside(store, "a/b/c/d/e/f")

    def test_readers_see_whole_objects_while_writers_replace_them(self, store: Store) -> None:
        versions = [bytes([letter]) * 200_000 for letter in b"abc"]
        seen: set[bytes | None] = set()

        def read() -> None:
            while not done:
                seen.add(store.get("pages/ab"))

        done = False
        store.put("pages/ab", versions[0])
        reader = Thread(target=read)
        reader.start()
        for turn in range(60):
            store.put("pages/ab", versions[turn % 3])
        done = True
        reader.join()
        assert seen <= set(versions)


class LimitConformance:
    """For stores that make room themselves: subclasses give `limited`, an empty store with a limit of 1000 bytes."""

    @pytest.fixture
    def limited(self) -> Iterator[Store]:
        raise NotImplementedError

    def test_the_least_recently_used_go_first(self, limited: Store) -> None:
        for name in "abcde":
            limited.put(f"pages/{name}", bytes(200))
        limited.touch(["pages/b", "pages/a"])
        for name in "fgh":
            limited.put(f"pages/{name}", bytes(200))
        kept = {entry.key.removeprefix("pages/") for entry in limited.list()}
        assert "a" in kept
        assert not {"c", "d", "e"} & kept
        assert sum(entry.nbytes for entry in limited.list()) <= 1000

    def test_the_limit_holds_after_every_object(self, limited: Store) -> None:
        for number in range(100):
            limited.put(f"pages/{number}", bytes(10 + 37 * number % 300))
            assert sum(entry.nbytes for entry in limited.list()) <= 1000
            assert limited.exists(f"pages/{number}")

    def test_what_can_never_fit_is_refused_and_nothing_lost(self, limited: Store) -> None:
        limited.put("pages/a", bytes(900))
        with pytest.raises(StoreError, match="pages/b: expected at most the limit of 1000 bytes, got 1001"):
            limited.put("pages/b", bytes(1001))
        assert limited.exists("pages/a")
        limited.put("pages/b", bytes(1000))
        assert [entry.key for entry in limited.list()] == ["pages/b"]
