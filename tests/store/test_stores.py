"""The stores that are always there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fibkv.errors import StoreError
from fibkv.store import DirectoryStore, MemoryStore, Store
from fibkv.store.directory import LEFTOVER_SECONDS
from tests.store.conformance import LimitConformance, StoreConformance


class TestMemoryStore(StoreConformance, LimitConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()

    @pytest.fixture
    def limited(self) -> Store:
        return MemoryStore(1000)

    def test_bytes_are_counted(self) -> None:
        store = MemoryStore()
        store.put("pages/a", bytes(5))
        store.put("pages/a", bytes(7))
        store.put("pages/b", bytes(1))
        assert store.nbytes == 8
        store.delete("pages/a")
        assert store.nbytes == 1


class TestDirectoryStore(StoreConformance, LimitConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return DirectoryStore(tmp_path / "store")

    @pytest.fixture
    def limited(self, tmp_path: Path) -> Store:
        return DirectoryStore(tmp_path / "store", limit_nbytes=1000)

    def test_objects_outlive_the_store(self, store: DirectoryStore) -> None:
        store.put("pages/ab", b"one")
        again = DirectoryStore(store.path, fsync=True)
        assert again.get("pages/ab") == b"one"
        again.put("pages/cd", b"two")
        assert store.get("pages/cd") == b"two"
        assert store.nbytes == 6
        assert repr(store) == f"DirectoryStore({str(store.path)!r})"

    def test_it_is_for_its_user_alone(self, store: DirectoryStore) -> None:
        assert store.path.stat().st_mode & 0o077 == 0

    def test_nothing_is_left_of_a_write_that_failed(self, store: DirectoryStore) -> None:
        (store.path / "pages" / "ab").mkdir(parents=True)  # a file cannot take its place
        with pytest.raises(StoreError, match="directory store, pages/ab"):
            store.put("pages/ab", b"one")
        assert [path for path in store.path.rglob("*") if path.is_file()] == []

    def test_leftovers_are_removed_at_the_start_and_those_still_written_are_not(self, store: DirectoryStore) -> None:
        store.put("pages/ab", b"one")
        dead, alive = store.path / "pages" / ".dead.0", store.path / "pages" / ".alive.0"
        for path in (dead, alive):
            path.write_bytes(b"half")
        os.utime(dead, (0, time.time() - LEFTOVER_SECONDS - 5))
        assert [entry.key for entry in store.list()] == ["pages/ab"]
        again = DirectoryStore(store.path)
        assert not dead.exists()
        assert alive.exists()
        assert again.get("pages/ab") == b"one"

    def test_foreign_files_are_not_listed(self, store: DirectoryStore) -> None:
        (store.path / "README.txt").write_text("hello")
        (store.path / "pages").mkdir()
        (store.path / "pages" / "Some.File").write_text("hello")
        assert list(store.list()) == []

    def test_a_directory_that_cannot_be_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match=r"directory store, .*file"):
            DirectoryStore(tmp_path / "file" / "store")

    def test_failures_are_errors_of_the_store(self, store: DirectoryStore) -> None:
        (store.path / "pages" / "ab").mkdir(parents=True)
        with pytest.raises(StoreError, match="directory store, pages/ab"):
            store.get("pages/ab")
        with pytest.raises(StoreError, match="directory store, pages/ab"):
            store.delete("pages/ab")

    def test_processes_write_and_evict_at_the_same_time(self, tmp_path: Path) -> None:
        path, limit, workers = tmp_path / "store", 100_000, 3
        code = (
            "import sys; from fibkv.store.directory import DirectoryStore\n"
            f"store = DirectoryStore({str(path)!r}, limit_nbytes={limit})\n"
            "for number in range(300):\n"
            "    name = f'pages/{(number * 7 + int(sys.argv[1])) % 50}'\n"
            "    store.put(name, name.encode() * 200)\n"
            "    found = store.get(f'pages/{number % 50}')\n"
            "    assert found is None or found == f'pages/{number % 50}'.encode() * 200\n"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(workers)]
        assert [process.wait(60) for process in running] == [0] * workers
        store = DirectoryStore(path)
        assert 0 < store.nbytes <= limit * (1 + workers / 8)
        assert all(store.get(entry.key) == entry.key.encode() * 200 for entry in store.list())
        assert not [name for _, _, names in os.walk(path) for name in names if name.startswith(".")]
