"""`fibkv pages` and the library calls behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fibkv.cli import app
from fibkv.container import Container
from fibkv.errors import ContractError, PageError
from fibkv.prefix_load import PrefixLoader
from fibkv.prefix_save import save_prefix
from fibkv.store import DirectoryStore, MemoryStore
from fibkv.store_objects import copy, find, open_object
from tests.store.prefixes import binding, fed

IDS = list(range(70))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "store")
    save_prefix(store, binding(), fed(IDS), IDS)
    return store


def pages(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pages", *map(str, arguments)])


def damage(store: DirectoryStore, folder: str) -> str:
    key = min(entry.key for entry in store.list(folder))
    path = store.path / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return key


def test_ls_lists_objects_with_their_bytes(store: DirectoryStore) -> None:
    shown = pages("ls", store.path)
    assert shown.exit_code == 0
    *lines, total = shown.stdout.splitlines()
    assert total.startswith("6 objects, ")
    assert sorted((line.split()[-1], int(line.split()[-2])) for line in lines) == sorted(
        (entry.key, entry.nbytes) for entry in store.list()
    )
    assert len(pages("ls", store.path, "spans").stdout.splitlines()) == 5
    assert pages("ls", store.path / "nowhere").exit_code == 2


def test_verify_finds_damage_and_moves_it_aside(store: DirectoryStore) -> None:
    shown = pages("verify", store.path)
    assert (shown.exit_code, shown.stdout.split(",")[0]) == (0, "6 objects sound")
    key = damage(store, "spans")
    for _ in range(2):
        shown = pages("verify", store.path)
        assert shown.exit_code == 1
        assert shown.stdout.startswith(f"{key}: ")
        assert "1 damaged" in shown.stdout
    assert f"-> aside/{key}" in pages("verify", store.path, "--aside").stdout
    shown = pages("verify", store.path)
    assert (shown.exit_code, shown.stdout.split(",")[0]) == (0, "5 objects sound")


def test_foreign_objects_of_any_depth_do_not_stop_verify(store: DirectoryStore) -> None:
    store.put("a/b/c/d/e", b"")
    key = damage(store, "spans")
    shown = pages("verify", store.path, "--aside")
    assert (shown.exit_code, shown.stdout.splitlines()[-1].split(",")[0]) == (1, "5 objects sound")
    assert {"aside/a/b/c/d/e", f"aside/{key}"} == {entry.key for entry in store.list("aside")}
    assert pages("verify", store.path).exit_code == 0


@pytest.mark.parametrize("folder", ["roots", "spans", "ends"])
def test_every_kind_of_object_is_verified(store: DirectoryStore, folder: str) -> None:
    damage(store, folder)
    assert pages("verify", store.path).exit_code == 1


def test_inspect_opens_an_object(store: DirectoryStore) -> None:
    for folder in ("roots", "spans", "ends"):
        key = min(entry.key for entry in store.list(folder))
        shown = pages("inspect", store.path, key[:16] if folder == "spans" else key)
        assert shown.exit_code == 0, shown.stdout
        assert shown.stdout.startswith(key)
        found = json.loads(pages("inspect", store.path, key, "--json").stdout)
        assert found["nbytes"] == (store.path / key).stat().st_size
        assert found["digest"] == Container.parse((store.path / key).read_bytes()).digest
    first = next(e for e in store.list("spans") if open_object(e.key, store.get(e.key) or b"").header.start == 0)
    shown = pages("inspect", store.path, first.key).stdout
    # 2 heads x 4 sinks raw, 2 heads x 12 tokens in fib; both layers.
    assert shown.count("raw 8, fib 24") == 4
    assert pages("inspect", store.path, "spans/").exit_code == 1
    damage(store, "ends")
    assert pages("inspect", store.path, "ends").exit_code == 1


def test_rm_removes_objects_and_folders(store: DirectoryStore) -> None:
    key = min(entry.key for entry in store.list("spans"))
    assert pages("rm", store.path, key, "ends").stdout.startswith("2 objects removed")
    assert len(list(store.list())) == 4
    assert pages("rm", store.path, "span").exit_code == 2
    assert len(list(store.list())) == 4


def test_export_copies_what_is_sound(store: DirectoryStore, tmp_path: Path) -> None:
    key = damage(store, "ends")
    shown = pages("export", store.path, tmp_path / "copy")
    assert shown.exit_code == 1
    assert shown.stdout.startswith("5 objects copied")
    assert f"{key}: damaged, not copied" in shown.stdout
    loader = PrefixLoader(DirectoryStore(tmp_path / "copy"), binding(), IDS)
    assert loader.root() is not None
    assert loader.load([layer.settings for layer in fed(IDS)]).length == 64
    pages("rm", store.path, "ends")
    shown = pages("export", store.path, tmp_path / "copy")
    assert (shown.exit_code, shown.stdout) == (0, "0 objects copied, 0 B; 5 were there\n")
    key = min(entry.key for entry in store.list("spans"))
    assert pages("export", store.path, tmp_path / "one", "--key", key).exit_code == 0
    assert (tmp_path / "one").read_bytes() == store.get(key)


def test_what_is_not_what_its_key_says_is_refused(store: DirectoryStore) -> None:
    spans = sorted(entry.key for entry in store.list("spans"))
    with pytest.raises(PageError, match="expected the object of this name"):
        open_object(spans[0], store.get(spans[1]) or b"")
    with pytest.raises(PageError, match="expected an object in one of roots, spans, ends"):
        open_object("aside/x", b"")
    with pytest.raises(ContractError, match="with which 0 begin"):
        find(store, "nothing")
    target = MemoryStore()
    assert copy(store, target).written == 6
    store.put("aside/spans/x", b"")
    assert copy(store, target).there == 6
