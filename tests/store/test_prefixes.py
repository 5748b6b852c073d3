"""Prefixes in a store: what is saved is found by its tokens, whatever fails makes it shorter, nothing raises."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest

from fibkv import prefix_spans
from fibkv.cache import LayerCache
from fibkv.errors import ContractError, DigestMismatch, PageError
from fibkv.kernels.native import why_not
from fibkv.packed import Packed
from fibkv.prefix import chain_names
from fibkv.prefix_load import Prefix, PrefixLoader
from fibkv.prefix_places import span_key
from fibkv.prefix_save import Saved, save_prefix
from fibkv.slabs import Slabs
from fibkv.store import DirectoryStore, MemoryStore, Store
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings
from tests.store.prefixes import PAGE, POLICY, FailingStore, binding, empty_layers, fed, layers_settings, same

IDS = list(range(100, 170))  # 70 tokens: 4 pages may be sealed, 6 tokens are raw


def loaded(store: Store, ids: Sequence[int]) -> tuple[list[LayerCache], PrefixLoader]:
    """New layers with what is found of a prompt."""
    loader = PrefixLoader(store, binding(), ids)
    layers = empty_layers()
    if loader.root() is not None:
        fill(layers, loader.load([layer.settings for layer in layers]))
    return layers, loader


def fill(layers: Sequence[LayerCache], prefix: Prefix) -> None:
    for index, layer in enumerate(layers):
        none = layer.tail.keys, layer.tail.values
        layer.adopt(prefix.pages[index], *(none if prefix.tails is None else prefix.tails[index]))


def span_keys(ids: Sequence[int]) -> list[str]:
    return [span_key(name) for name in chain_names(binding().name, ids, range(PAGE, len(ids) + 1, PAGE))]


def saved(store: Store, ids: Sequence[int]) -> Saved:
    return save_prefix(store, binding(), fed(ids), ids)


def test_what_is_saved_comes_back_bit_for_bit() -> None:
    store = MemoryStore()
    first = saved(store, IDS)
    assert first.failure is None
    assert (first.tokens, first.written, first.shared) == (70, 6, 0)
    assert first.nbytes == store.nbytes
    layers, loader = loaded(store, [*IDS, 7, 8, 9])
    assert (layers[0].length, loader.failures, loader.nbytes) == (70, [], store.nbytes)
    assert same(layers, fed(IDS))


class BusyStore(MemoryStore):
    """Takes its time, by a clock of its own too, and notes how many ask at the same time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.now, self.asking, self.most = seconds, 0.0, 0, 0
        self.lock = Lock()

    def get(self, key: str) -> bytes | None:
        with self.lock:
            self.asking += 1
            self.most = max(self.most, self.asking)
        if self.seconds:
            time.sleep(self.seconds)
        with self.lock:
            self.now += self.seconds
            self.asking -= 1
        return super().get(key)


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 1), (0.05, 4)])
def test_spans_are_read_ahead_of_need_where_a_store_answers_late(
    seconds: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_spans, "MAX_GROUP", 2)
    store, ids = BusyStore(seconds), range(30 * PAGE)
    # Whatever else the machine does.
    monkeypatch.setattr(prefix_spans, "perf_counter", lambda: store.now)
    layers = fed(ids)
    save_prefix(store, binding(), layers, ids)
    store.most = 0
    found, loader = loaded(store, ids)
    assert (loader.failures, same(found, layers), store.most) == ([], True, most)


@pytest.mark.skipif(why_not() != "yes", reason=why_not())
def test_spans_go_straight_to_where_kernels_read_them() -> None:
    on_kernels = [replace(layer_settings(policy=POLICY, implementation="auto"), layer=layer) for layer in range(2)]
    store, ids = MemoryStore(), range(40 * PAGE + 9)
    layers = fed(ids, on_kernels)
    save_prefix(store, binding(), layers, ids)
    for damaged, length in ((None, len(ids)), (25, 25 * PAGE), (3, 3 * PAGE), (0, 0)):  # 16 spans are read together
        if damaged is not None:
            key = span_keys(ids)[damaged]
            data = bytearray(store.get(key) or b"")
            data[-1000] ^= 1
            store.put(key, data)
        loader = PrefixLoader(store, binding(), ids)
        prefix = loader.load(on_kernels, slabs=Slabs())
        assert (prefix.length, len(loader.failures)) == (length, damaged is not None)
        for layer, pages in zip(layers, prefix.pages, strict=True):
            assert all(isinstance(one.held, Packed) for page in pages for one in (*page.keys, *page.values))
            assert [page.compute_digest() for page in pages] == [page.digest for page in layer.rows[0][: len(pages)]]


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(is_on: bool) -> None:
    store = MemoryStore()
    saved(store, IDS)
    try:
        (gc.enable if is_on else gc.disable)()
        loaded(store, IDS)
        assert gc.isenabled() == is_on
    finally:
        gc.enable()


def test_a_cache_goes_on_from_what_was_loaded_as_from_what_was_saved() -> None:
    store = MemoryStore()
    original = fed(IDS)
    save_prefix(store, binding(), original, IDS)
    layers, _ = loaded(store, IDS)
    for layer in (*original, *layers):
        for step in range(30):
            layer.append(gaussian(1, HEADS, 1, DIM, seed=step), gaussian(1, HEADS, 1, DIM, seed=step + 500))
    assert same(layers, original)
    assert layers[0].length == 100


def test_prompts_share_spans_as_far_as_they_agree() -> None:
    store = MemoryStore()
    saved(store, IDS)
    other = [*IDS[:40], *range(500, 540)]
    again = saved(store, other)
    # Two spans of 16 agree; the rest, of 4 spans that may be sealed, and the end are new.
    assert (again.shared, again.written) == (2, 3)
    layers, _ = loaded(store, [*IDS[:35], 1, 2, 3])
    assert layers[0].length == 32
    expected = fed(IDS)
    for layer in expected:
        layer.crop(32)
    assert same(layers, expected)
    for ids in (IDS, other):
        assert same(loaded(store, ids)[0], fed(ids))


def test_saving_again_writes_only_what_is_new() -> None:
    store = MemoryStore()
    saved(store, IDS)
    longer = [*IDS, *range(40)]
    again = saved(store, longer)
    # 6 spans may be sealed of 110 tokens: 4 are there.
    assert (again.shared, again.written) == (4, 3)
    assert saved(store, longer).written == 0


def test_a_short_prompt_is_all_end() -> None:
    store = MemoryStore()
    assert saved(store, IDS[:9]).written == 2
    assert same(loaded(store, IDS)[0], fed(IDS[:9]))


def test_the_longest_end_that_the_prompt_goes_on_with_is_taken() -> None:
    store = MemoryStore()
    for length in (65, 66, 68):
        saved(store, IDS[:length])
    saved(store, [*IDS[:66], 1, 2])
    assert loaded(store, [*IDS[:69], 5])[0][0].length == 68
    assert loaded(store, [*IDS[:64], 5])[0][0].length == 48


def test_a_page_that_a_crop_has_shortened_comes_back() -> None:
    store, layers = MemoryStore(), fed(IDS)
    for layer in layers:
        layer.crop(40)
        layer.append(gaussian(1, HEADS, 40, DIM, seed=3), gaussian(1, HEADS, 40, DIM, seed=4))
    ids = [*IDS[:40], *range(40)]
    assert [(page.start, page.tokens) for page in layers[0].rows[0]] == [(0, 16), (16, 16), (32, 8), (40, 16), (56, 16)]
    assert save_prefix(store, binding(), layers, ids).failure is None
    assert same(loaded(store, ids)[0], layers)
    assert loaded(store, ids[:50])[0][0].length == 32


def test_other_bindings_find_nothing() -> None:
    store = MemoryStore()
    saved(store, IDS)
    for other in (
        binding(weights="name:other"),
        binding(codec="fib2"),
        binding(policy=layers_settings()[0].keys.policy.raw()),
    ):
        assert PrefixLoader(store, other, IDS).root() is None


def test_prefixes_in_pages_of_other_profiles_are_not_mixed() -> None:
    store = MemoryStore()
    saved(store, IDS)
    layers = fed(IDS, layers_settings(codec="fib2"))  # as if fib4 meant something else on this machine
    result = save_prefix(store, binding(), layers, IDS)
    assert result.written == 0
    assert "pages of other profiles" in str(result.failure)


def test_misuse_is_refused() -> None:
    store = MemoryStore()
    with pytest.raises(ContractError, match="the ids of the 70 tokens held, got '69 ids'"):
        save_prefix(store, binding(), fed(IDS), IDS[:-1])
    with pytest.raises(ContractError, match="at least one"):
        save_prefix(store, binding(), empty_layers(), IDS)
    with pytest.raises(ContractError, match=r"hold the same tokens.*lengths \[68, 70\]"):
        save_prefix(store, binding(), [fed(IDS)[0], fed(IDS[:68])[1]], IDS)
    twins = fed(IDS)
    for layer in twins:
        layer.select([0, 0])
    with pytest.raises(ContractError, match=r"one row; .*got '2 rows'"):
        save_prefix(store, binding(), twins, IDS)
    damaged = fed(IDS)
    with damaged[1].corrupted(0, 2), pytest.raises(DigestMismatch):
        save_prefix(store, binding(), damaged, IDS)
    (layer, _) = fed(IDS)
    page = layer.rows[0][1]
    with pytest.raises(PageError, match="without gaps"):
        empty_layers()[0].adopt([page], layer.tail.keys, layer.tail.values)


@pytest.mark.parametrize("kind", ["roots", "spans", "ends"])
def test_damage_makes_the_prefix_shorter_and_is_moved_aside(kind: str) -> None:
    store = MemoryStore()
    saved(store, IDS)
    key = span_keys(IDS)[3] if kind == "spans" else next(store.list(kind)).key
    data = bytearray(store.get(key) or b"")
    data[len(data) // 2] ^= 16
    store.put(key, bytes(data))
    layers, loader = loaded(store, IDS)
    assert layers[0].length == {"roots": 0, "spans": 48, "ends": 64}[kind]
    assert len(loader.failures) == 1
    assert key in loader.failures[0]
    assert [entry.key for entry in store.list("aside")] == [f"aside/{key}"]
    # The next save mends it.
    assert saved(store, IDS).written == 1
    assert same(loaded(store, IDS)[0], fed(IDS))


def test_foreign_objects_among_the_ends_are_none() -> None:
    store = MemoryStore()
    saved(store, IDS)
    (end,) = store.list("ends")
    folder = end.key.rsplit("/", maxsplit=2)[0]
    for name in ("x", "y/z", f"70/{'a' * 63}", "70/b/c", f"{'9' * 30}/{'a' * 64}"):
        store.put(f"{folder}/{name}", b"x")
    layers, loader = loaded(store, IDS)
    assert loader.failures == []
    assert same(layers, fed(IDS))


def test_a_missing_span_is_no_failure() -> None:
    store = MemoryStore()
    saved(store, IDS)
    for index, length in ((3, 48), (0, 0)):
        store.delete(span_keys(IDS)[index])
        layers, loader = loaded(store, IDS)
        assert (layers[0].length, loader.failures) == (length, [])
    assert saved(store, IDS).written == 2


def test_a_span_under_another_name_is_refused() -> None:
    store = MemoryStore()
    saved(store, IDS)
    keys = span_keys(IDS)
    store.put(keys[1], store.get(keys[2]) or b"")
    layers, loader = loaded(store, IDS)
    assert layers[0].length == PAGE
    assert "expected (name, previous, start, tokens)" in loader.failures[0]


@pytest.mark.parametrize("operation", ["get", "put", "exists", "delete", "list", "touch"])
def test_a_store_that_fails_never_raises(operation: str) -> None:
    sound = MemoryStore()
    saved(sound, IDS)
    for kind in ("roots", "spans", "ends"):
        store = FailingStore(lambda asked, key, kind=kind: asked == operation and key.startswith(kind))
        result = saved(store, IDS)
        store._objects = dict(sound._objects)
        layers, loader = loaded(store, IDS)
        assert layers[0].length in (0, 48, 64, 70)
        if layers[0].length == 70:
            assert same(layers, fed(IDS))
        else:
            assert "the disk is on fire" in loader.failures[0]
        assert result.failure is None or "the disk is on fire" in result.failure


def test_the_beginning_outlives_what_follows() -> None:
    whole = MemoryStore()
    saved(whole, IDS)
    store = MemoryStore(whole.nbytes * 2)
    saved(store, IDS)
    for number in range(6):
        saved(store, [*IDS[:40], number, *range(300, 330)])
        loaded(store, IDS[:33])
    assert loaded(store, IDS)[0][0].length >= 32


KILLED = """
import os, signal, sys
from pathlib import Path
from fibkv.prefix_save import save_prefix
from fibkv.slabs import Slabs
from fibkv.store import DirectoryStore
from tests.store.prefixes import binding, fed

layers = fed(range(70))
for turn in range(12):
    if (child := os.fork()) == 0:
        rename, count = Path.replace, 0

        def replace(self, target):
            global count
            count += 1
            if turn % 2 == 0 and count > turn // 2:
                os.kill(os.getpid(), signal.SIGKILL)  # written, not yet in its place
            rename(self, target)
            if count > turn // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = replace
        save_prefix(DirectoryStore(f"{sys.argv[1]}/{turn}"), binding(), layers, range(70))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_no_kill_leaves_anything_but_a_shorter_prefix(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=60)
    lengths = []
    for turn in range(12):
        store = DirectoryStore(tmp_path / str(turn))
        layers, loader = loaded(store, range(70))
        assert loader.failures == []
        lengths.append(layers[0].length)
        expected = fed(range(70))
        for layer in expected:
            layer.crop(lengths[-1])
        assert same(layers, expected)
        assert save_prefix(store, binding(), fed(range(70)), range(70)).failure is None
        assert same(loaded(store, range(70))[0], fed(range(70)))
    # Root, four spans, end: killed before and after each appeared.
    assert lengths == [0, 0, 0, 16, 16, 32, 32, 48, 48, 64, 64, 70]
