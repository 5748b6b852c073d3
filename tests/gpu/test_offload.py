"""Pages in pinned host memory beside a CUDA device: read as if they were on it, and fetched without a wait."""

from __future__ import annotations

import pickle

import pytest
import torch

import fibkv
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.hf_argument import with_cache
from fibkv.inventory import Inventory
from fibkv.page_memory import HostPageMemory, PageMemories
from fibkv.quarantine import Quarantine
from fibkv.store import MemoryStore
from tests.gpu.conftest import NoWaits
from tests.hf.models import build, prompt
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting

CUDA = torch.device("cuda", 0)
SETTINGS = layer_settings("key3", "value3", protecting(first_tokens_raw=4, last_tokens_raw=5), implementation="triton")
SCORES = Scores(scale=0.125)


class Layers:
    """Layers of one cache that are offloaded, and the same ones on the device."""

    def __init__(self, count: int) -> None:
        self.memories = PageMemories(Inventory(), offloading=True)
        empty = torch.zeros(1, HEADS, 0, DIM, device=CUDA)
        made = [self.memories.on(CUDA) for _ in range(count)]
        assert all(isinstance(memory, HostPageMemory) for memory in made)
        self.layers = [LayerCache(SETTINGS, empty, empty, Quarantine(), memory=memory) for memory in made]
        self.plain = [LayerCache(SETTINGS, empty, empty, Quarantine()) for _ in range(count)]

    def inputs(self, tokens: int, seed: int) -> list[tuple[torch.Tensor, ...]]:
        made = []
        for index in range(len(self.layers)):
            shapes = ((HEADS, tokens), (HEADS, tokens), (4, tokens))
            made.append(tuple(gaussian(1, *s, DIM, seed=seed + 7 * index + i).to(CUDA) for i, s in enumerate(shapes)))
        return made

    def run(self, layers: list[LayerCache], inputs: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        return [
            attend(query, layer.append(keys, values), SCORES)[0]
            for layer, (keys, values, query) in zip(layers, inputs, strict=True)
        ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layers_are_read_as_if_they_were_on_the_device(count: int) -> None:
    layers = Layers(count)
    for seed, tokens in enumerate((900, 1, 1, 60, 1, 1, 1, 16, 1)):
        new = layers.inputs(tokens, 100 * seed)
        for mine, theirs in zip(layers.run(layers.layers, new), layers.run(layers.plain, new), strict=True):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(layers.layers, layers.plain, strict=True):
        assert [page.digest for page in mine.rows[0]] == [page.digest for page in theirs.rows[0]]
        assert all(page.device.type == "cpu" for page in mine.rows[0])
        assert all(t.is_pinned() for page in mine.rows[0] for s in page.keys for _, t in s.codes.named() if t.numel())


def test_steps_that_seal_nothing_wait_for_nothing(no_waits: NoWaits) -> None:
    layers = Layers(3)
    layers.run(layers.layers, layers.inputs(900, 0))
    for seed in (1, 2, 3):
        layers.run(layers.layers, layers.inputs(1, seed))
    new = [layers.inputs(1, seed) for seed in (4, 5)]
    torch.cuda.synchronize()
    with no_waits():
        for inputs in new:
            layers.run(layers.layers, inputs)


def test_many_steps_race_with_nothing() -> None:
    """Buffers are filled while others are read: a race would show as another output."""
    layers = Layers(4)
    new = layers.inputs(4000, 0)
    layers.run(layers.layers, new)
    layers.run(layers.plain, new)
    steps = [layers.inputs(1, seed) for seed in range(30)]
    torch.cuda.synchronize()
    mine = [layers.run(layers.layers, inputs) for inputs in steps]
    theirs = [layers.run(layers.plain, inputs) for inputs in steps]
    assert all(torch.equal(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_the_device_holds_the_buffers_and_not_the_pages() -> None:
    layers = Layers(6)
    layers.run(layers.layers, layers.inputs(4000, 0))
    layers.run(layers.layers, layers.inputs(1, 1))
    codes = sum(layer.offloaded()[0] for layer in layers.layers)
    assert layers.memories.buffer_nbytes <= codes * 2 / 6 * 1.3
    assert len(layers.memories._offloads[CUDA]._buffers) == 2


def test_a_model_generates_the_same() -> None:
    model = build("llama", torch.bfloat16).to(CUDA)
    ids = prompt(1, 300).to(CUDA)
    made = []
    for offloading in (False, True):
        cache = fibkv.Cache(model, bits=4, offloading=offloading)
        with fibkv.attention(model):
            made.append(model.generate(ids, **with_cache(cache), max_new_tokens=80, do_sample=False))
        assert cache.report().materialized == 0
        assert cache.verify() == ()
    assert torch.equal(*made)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    with fibkv.attention(model), torch.no_grad():
        model(ids[:, :1], **with_cache(cache))


def test_stores_and_copies() -> None:
    """What an offloaded cache saved is found by one on the device and by one that is offloaded too."""
    model = build("llama", torch.bfloat16).to(CUDA)
    ids, store = prompt(1, 400).to(CUDA), MemoryStore()
    cache = fibkv.Cache(model, bits=4, offloading=True)
    with fibkv.attention(model), torch.no_grad():
        model(ids[:, :390], **with_cache(cache))
        expected = model(ids[:, 390:], **with_cache(cache.fork())).logits
        assert cache.save(store, ids[:, :390]).failure is None
        for offloading in (False, True):
            found = fibkv.restore(model, ids[:, :391], store, bits=4, offloading=offloading)
            assert found.get_seq_length() == 390
            assert torch.equal(model(ids[:, 390:], **with_cache(found)).logits, expected)
        again = pickle.loads(pickle.dumps(cache))
        assert torch.equal(model(ids[:, 390:], **with_cache(again)).logits, expected)
