"""Pages sealed by a worker thread: in the end the same ones, raw tokens until then, and a bounded backlog."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fibkv.cache import LayerCache
from fibkv.deferred import Worker
from fibkv.errors import EncodingError
from fibkv.inventory import Inventory
from fibkv.page_memory import DeferringPageMemory, PageMemory
from fibkv.quarantine import Quarantine
from fibkv.regions import FallbackSettings
from fibkv.sealing import LayerSettings
from fibkv.slabs import Slabs
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting

CPU = torch.device("cpu")
POLICY = protecting(first_tokens_raw=4, last_tokens_raw=5)
TOKEN_NBYTES = 2 * HEADS * DIM * 4


class Gate:
    """Keeps a worker busy until it is opened."""

    def __init__(self, worker: Worker) -> None:
        self._event = threading.Event()
        worker.submit(self._wait, 0)

    def _wait(self) -> tuple[list[list[object]], None]:
        assert self._event.wait(60)
        return [], None

    def open(self) -> None:
        self._event.set()

    def open_soon(self) -> None:
        threading.Timer(0.2, self.open).start()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def gate(worker: Worker) -> Iterator[Gate]:
    gate = Gate(worker)
    yield gate
    gate.open()


def make(
    worker: Worker | None, layer: LayerSettings | None = None, *, batch: int = 1, inventory: Inventory | None = None
) -> LayerCache:
    """A layer whose pages a worker seals; without one they are sealed at once."""
    empty = torch.zeros(batch, HEADS, 0, DIM)
    memory = PageMemory(Slabs(), CPU) if worker is None else DeferringPageMemory(Slabs(), CPU, worker)
    settings = layer or layer_settings(policy=POLICY)
    return LayerCache(settings, empty, empty, Quarantine(), inventory, memory=memory)


def tokens(count: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    return gaussian(batch, HEADS, count, DIM, seed=seed), gaussian(batch, HEADS, count, DIM, seed=seed + 100)


def digests(cache: LayerCache) -> list[list[str]]:
    return [[page.digest for page in row] for row in cache.rows]


def assert_equal_reads(cache: LayerCache, other: LayerCache) -> None:
    for mine, theirs in zip(cache.view().decode(torch.float32), other.view().decode(torch.float32), strict=True):
        assert torch.equal(mine, theirs)


def test_tokens_are_read_raw_while_they_are_encoded(worker: Worker, gate: Gate) -> None:
    cache, plain, given = make(worker), make(None), []
    for at, count in enumerate((40, 1, 3, 1)):
        given.append(tokens(count, seed=at))
        view = cache.append(*given[-1])
        plain.append(*given[-1])
        for read, exact in zip(
            view.decode(torch.float32), (torch.cat(side, 2) for side in zip(*given, strict=True)), strict=True
        ):
            assert torch.equal(read, exact)
    assert worker.backlog_nbytes == 32 * TOKEN_NBYTES
    gate.open()
    assert digests(cache) == digests(plain)
    assert cache.tail.length == plain.tail.length == 13
    assert cache.flags == plain.flags
    assert_equal_reads(cache, plain)
    cache.verify()
    assert cache.quarantine.records == ()


def test_what_is_there_is_taken_over_by_the_next_append(worker: Worker, gate: Gate) -> None:
    cache = make(worker)
    cache.append(*tokens(40))
    gate.open()
    worker.submit(lambda: ([], None), 0).result()
    cache.append(*tokens(1))
    assert len(cache._rows[0]) == 2
    assert cache._tail.length == 9


def test_more_pages_that_are_due_wait_for_those_under_way(worker: Worker, gate: Gate) -> None:
    cache, plain = make(worker), make(None)
    for layer in (cache, plain):
        layer.append(*tokens(40))
    gate.open_soon()
    for layer in (cache, plain):
        layer.append(*tokens(20, seed=1))
    assert len(cache._rows[0]) == 2
    assert digests(cache) == digests(plain)


@pytest.mark.parametrize(
    ("keys", "values", "implementation"), [("fib4", "int8", "reference"), ("trelliskey2", "trellis2", "auto")]
)
def test_layers_of_one_worker_end_as_those_sealed_at_once(keys: str, values: str, implementation: str) -> None:
    """Two threads at work: appends of many sizes, no gate."""
    settings = layer_settings(keys, values, policy=POLICY, implementation=implementation)
    worker = Worker(most_nbytes=100 * TOKEN_NBYTES)
    deferred, plain = ([make(one, settings, batch=2) for _ in range(3)] for one in (worker, None))
    for at, count in enumerate((37, 1, 1, 16, 2, 50, *(1,) * 20)):
        for layers in (deferred, plain):
            for layer, cache in enumerate(layers):
                cache.append(*tokens(count, batch=2, seed=7 * at + layer))
    for mine, theirs in zip(deferred, plain, strict=True):
        assert digests(mine) == digests(theirs)
        assert mine.flags == theirs.flags
        assert mine.nbytes == theirs.nbytes
        assert_equal_reads(mine, theirs)
    assert worker.backlog_nbytes == 0


@pytest.mark.parametrize("use", ["report", "crop", "select", "copy", "pickle", "verify", "to", "view"])
def test_whatever_asks_for_pages_waits_for_them(use: str, worker: Worker, gate: Gate) -> None:
    cache, plain = make(worker), make(None)
    for layer in (cache, plain):
        layer.append(*tokens(60))
        layer.append(*tokens(1, seed=1))
    gate.open_soon()
    match use:
        case "report":
            assert cache.nbytes == plain.nbytes
        case "crop":
            cache.crop(40)
            plain.crop(40)
        case "select":
            cache.select([0, 0])
            plain.select([0, 0])
        case "copy":
            cache = copy.deepcopy(cache)
        case "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        case "verify":
            cache.verify()
        case "to":
            cache.to(CPU)
        case "view":
            cache.view()
    assert [len(row) for row in cache._rows] == [len(row) for row in plain._rows]
    assert digests(cache) == digests(plain)
    for layer in (cache, plain):
        layer.append(*tokens(30, batch=layer.batch, seed=2))
    assert digests(cache) == digests(plain)


class TestTheBacklog:
    def test_it_is_bounded(self) -> None:
        worker = Worker(most_nbytes=40 * TOKEN_NBYTES)
        gate = Gate(worker)
        first, second = make(worker), make(worker)
        first.append(*tokens(40))
        assert worker.backlog_nbytes == 32 * TOKEN_NBYTES
        gate.open_soon()
        second.append(*tokens(40))
        assert worker.backlog_nbytes <= 32 * TOKEN_NBYTES
        assert len(first.rows[0]) == len(second.rows[0]) == 2

    def test_what_exceeds_it_is_sealed_at_once(self) -> None:
        worker = Worker(most_nbytes=31 * TOKEN_NBYTES)
        gate = Gate(worker)
        cache = make(worker)
        cache.append(*tokens(40))
        assert len(cache._rows[0]) == 2
        gate.open()

    def test_raw_tokens_are_counted_until_their_pages_are_there(self, worker: Worker, gate: Gate) -> None:
        inventory = Inventory()
        cache = make(worker, inventory=inventory)
        cache.append(*tokens(60))
        assert inventory.meter.total - inventory.tables_nbytes >= 60 * TOKEN_NBYTES
        gate.open()
        cache.settle()
        assert inventory.meter.total - inventory.tables_nbytes < 60 * TOKEN_NBYTES


class TestWhatCannotBeEncoded:
    def bad(self) -> tuple[Tensor, Tensor]:
        keys, values = tokens(32, batch=2)
        values[1, 0, 20, 3] = torch.inf
        return keys, values

    def test_it_is_kept_raw(self, worker: Worker) -> None:
        cache, plain = (make(one, layer_settings(), batch=2) for one in (worker, None))
        for layer in (cache, plain):
            layer.append(*self.bad())
            layer.append(*tokens(1, batch=2))
        assert dict(cache.raw_reasons()) == dict(plain.raw_reasons()) == {"not_encodable": HEADS * 16}

    def test_the_next_append_fails_as_it_would_have_at_once_and_changes_nothing(self, worker: Worker) -> None:
        base = layer_settings()
        closed = base.values.profile.model_copy(update={"fallback": FallbackSettings(mode="fail_closed")})
        settings = replace(base, values=replace(base.values, profile=closed))
        with pytest.raises(EncodingError) as expected:
            make(None, settings, batch=2).append(*self.bad())
        cache = make(worker, settings, batch=2)
        cache.append(*self.bad())
        worker.submit(lambda: ([], None), 0).result()
        for _ in range(2):
            with pytest.raises(EncodingError) as found:
                cache.append(*tokens(1, batch=2))
            assert str(found.value) == str(expected.value)
        assert cache.length == cache.tail.length == 32


def test_read_through_and_pools_wait(worker: Worker) -> None:
    tracked = Inventory()
    tracked.tracked = True
    for cache in (make(worker, layer_settings(read_through=True)), make(worker, inventory=tracked)):
        cache.append(*tokens(40))
        assert cache._pending is None
        assert len(cache._rows[0]) >= 2


def test_the_worker_leaves_torchs_threads_alone(worker: Worker) -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        worker.submit(lambda: ([], (str(torch.get_num_threads()),)), 0).result()
        assert worker.submit(lambda: ([], (str(torch.get_num_threads()),)), 0).result()[1] == ("1",)
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (torch.get_num_threads(), found) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_the_thread_ends_with_the_worker() -> None:
    worker = Worker()
    worker.submit(lambda: ([], None), 0).result()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("fibkv-sealing")]
    del worker
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert threads
    assert not any(thread.is_alive() for thread in threads)
