"""Pages in host memory: fetched ahead of the layer that reads them, never read before they are there or after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fibkv import offload
from fibkv.attend import Scores, attend
from fibkv.blocks import Layout
from fibkv.cache import LayerCache
from fibkv.offload import LEAST_REGION, Offload, codes_of
from fibkv.page_memory import HostPageMemory, Line, PageMemory
from fibkv.quarantine import Quarantine
from fibkv.slabs import Slabs
from fibkv.view import View
from tests.codecs.waits import Waits
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting
from tests.pages.streams import LateStream

CPU = torch.device("cpu")
SETTINGS = layer_settings(policy=protecting(first_tokens_raw=4, last_tokens_raw=5))
SCORES = Scores(scale=0.125)


class Layers:
    """Layers of one cache that are offloaded, and the same ones as they would be on their device."""

    def __init__(self, count: int, batch: int = 1) -> None:
        self.stream = LateStream()
        self.offload = Offload(CPU, self.stream)
        line, self.batch = Line(), batch
        self.layers = [self._layer(HostPageMemory(Slabs(), CPU, line, self.offload)) for _ in range(count)]
        self.plain = [self._layer(PageMemory(Slabs(), CPU)) for _ in range(count)]
        self._seed = 0

    def _layer(self, memory: PageMemory) -> LayerCache:
        empty = torch.zeros(self.batch, HEADS, 0, DIM)
        return LayerCache(SETTINGS, empty, empty, Quarantine(), memory=memory)

    def step(self, tokens: int) -> list[View]:
        """One pass of a model, which attends to each layer in turn; returns what it read, and holds on to it."""
        return list(self.steps(tokens))

    def run(self, *tokens: int) -> None:
        """Passes of a model that holds on to nothing."""
        for count in tokens:
            for view in self.steps(count):
                del view

    def steps(self, tokens: int) -> Iterator[View]:
        for layer, plain in zip(self.layers, self.plain, strict=True):
            self._seed += 1
            new = [gaussian(self.batch, HEADS, tokens, DIM, seed=self._seed + part) for part in (0, 500)]
            query = gaussian(self.batch, 4, tokens, DIM, seed=self._seed + 1000)
            view, expected = layer.append(*new), plain.append(*new)
            assert torch.equal(attend(query, view, SCORES)[0], attend(query, expected, SCORES)[0])
            yield view
            del view


def copied(stream: LateStream) -> int:
    """Bytes that were to be copied, either way."""
    return sum(into.numel() for into, _ in stream.copies)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_layers_are_read_as_if_they_were_on_the_device(count: int, batch: int) -> None:
    layers = Layers(count, batch)
    layers.run(70, 1, 1, 30, 1, 1, 1, 16, 1)
    assert len(layers.offload._buffers) == min(count, 2)
    for layer, plain in zip(layers.layers, layers.plain, strict=True):
        assert [page.digest for page in layer.rows[0]] == [page.digest for page in plain.rows[0]]


def test_the_next_layer_is_fetched_while_one_attends() -> None:
    layers = Layers(3)
    layers.run(70)
    layers.run(1)
    pages = sum(layers.layers[1]._home.archive.used)
    before = copied(layers.stream)
    layers.layers[0].append(*[gaussian(1, HEADS, 1, DIM)] * 2)
    # Its own pages were fetched while the last layer of the step before attended.
    assert copied(layers.stream) - before == pages
    _, data = layers.stream.copies[-1]
    assert data is not None, "the model does not wait for what the next layer needs"


def test_nothing_is_waited_for_on_the_host() -> None:
    layers = Layers(3)
    layers.run(70)
    layers.run(1)
    waits = layers.stream.waits
    new = [gaussian(1, HEADS, 1, DIM)] * 2
    with Waits() as found:
        for layer in layers.layers:
            layer.append(*new)
    assert found.found == []
    assert layers.stream.waits == waits


@pytest.mark.parametrize("count", [2, 3])
def test_addresses_hold_from_step_to_step(count: int) -> None:
    """What kernels derive from a page table is derived once per buffer that a layer is in."""
    layers = Layers(count)
    layers.run(70, 1)
    tables = []
    for _ in range(6):
        for view in layers.steps(1):
            tables.append(view.rows)
            del view
    assert len({id(rows) for rows in tables[::count]}) == 1 + count % 2


def test_what_is_still_read_is_not_overwritten() -> None:
    """Models that hand keys of one layer to later ones (Gemma 3n) hold on to them."""
    layers = Layers(4)
    layers.run(70)
    held = layers.step(1)
    kept = [view.decode(torch.float32) for view in held]
    layers.run(1)
    layers.run(1)
    for view, expected in zip(held, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(view.decode(torch.float32), expected, strict=True))
    del held, view
    for _ in range(3):
        layers.run(1)
    assert len(layers.offload._buffers) == 2, "buffers that nothing reads go"


def test_a_fork_and_its_original_go_on_apart() -> None:
    layers = Layers(2)
    layers.run(70)
    fork = copy.deepcopy(layers)
    for one in (layers, fork, layers, fork):
        one.run(30)
    for mine, theirs in zip(layers.layers, fork.layers, strict=True):
        assert mine.rows[0][0] is theirs.rows[0][0]
        assert mine._home.archive is not theirs._home.archive
    assert fork.layers[0]._home._offload is fork.layers[1]._home._offload is not layers.offload


def test_a_layer_that_is_pickled_has_its_pages_in_memory_of_its_own() -> None:
    layers = Layers(1)
    layers.run(70)
    cache = layers.layers[0]
    copied = pickle.loads(pickle.dumps(cache))
    assert [page.digest for page in copied.rows[0]] == [page.digest for page in cache.rows[0]]
    assert copied._home.archive.place_of(copied.rows[0][0]) == (0, 0)
    copied.verify()
    assert copied.quarantine.records == ()


def test_rows_that_are_cropped_and_selected() -> None:
    layers = Layers(3, batch=2)
    layers.run(70)
    for length, rows in ((50, [0, 0]), (40, [1, 0]), (3, [0, 1])):
        for layer in (*layers.layers, *layers.plain):
            layer.crop(length)
            layer.select(rows)
        layers.run(40)
        layers.run(1)


def test_memory_of_pages_that_are_gone_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_REGION", 1 << 14)
    layers = Layers(1)
    layer = layers.layers[0]
    for _ in range(8):
        layers.run(200)
        layer.crop(50)
        layers.plain[0].crop(50)
    layers.run(1)
    archive, most = layer._home.archive, max(Layout.of(codes_of(page)).nbytes for page in layer.pages())
    assert sum(archive.used) <= (1 << 14) + 2 * (250 // 16) * most
    assert archive.version


def test_poison_reaches_what_is_read() -> None:
    layers = Layers(2)
    layers.run(70)
    layer, query = layers.layers[0], gaussian(1, 4, 1, DIM)

    def out() -> Tensor:
        return attend(query, layer.view(), SCORES)[0]

    before = out()
    with layer.corrupted(0, 1):
        assert not torch.equal(out(), before)
    assert torch.equal(out(), before)


def test_bytes_are_counted_on_both_sides() -> None:
    layers = Layers(3)
    layers.run(70)
    layers.run(1)
    pages = [[*layer.pages()] for layer in layers.layers]
    codes = [sum(s.held.nbytes for page in layer for s in (*page.keys, *page.values)) for layer in pages]
    assert [layer.offloaded() for layer in layers.layers] == [(nbytes, LEAST_REGION) for nbytes in codes]
    assert layers.offload.nbytes == sum(buffer.memory.numel() for buffer in layers.offload._buffers)
    assert layers.offload.nbytes >= 2 * max(codes)
