"""Pages sealed beside the model: equal to those sealed at once, waited for late, never read before they are there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fibkv import kernels
from fibkv.blocks import rounded
from fibkv.cache import LayerCache
from fibkv.errors import EncodingError
from fibkv.inventory import Inventory
from fibkv.page_memory import MOST_LAYERS, DevicePageMemory, Line, PageMemory
from fibkv.quarantine import Quarantine
from fibkv.regions import FallbackSettings
from fibkv.sealing import LayerSettings
from fibkv.slabs import Slabs
from fibkv.space import KeySpace
from tests.codecs.waits import Waits
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting
from tests.pages.streams import LateStream

CPU = torch.device("cpu")
POLICY = protecting(first_tokens_raw=4, last_tokens_raw=5)
TRITON = ["triton"] if kernels.available()["triton"] == "yes" else []


def make(
    layer: LayerSettings | None = None, *, batch: int = 1, line: Line | None = None, beside: bool = True
) -> tuple[LayerCache, LateStream]:
    empty, stream = torch.zeros(batch, HEADS, 0, DIM), LateStream()
    memory = DevicePageMemory(Slabs(), CPU, stream, line or Line()) if beside else PageMemory(Slabs(), CPU)
    return LayerCache(layer or layer_settings(policy=POLICY), empty, empty, Quarantine(), memory=memory), stream


def tokens(count: int, *, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(batch, HEADS, count, DIM, seed=seed), gaussian(batch, HEADS, count, DIM, seed=seed + 100)


def digests(cache: LayerCache) -> list[list[str]]:
    return [[page.digest for page in row] for row in cache.rows]


@pytest.mark.parametrize("implementation", ["reference", *TRITON])
@pytest.mark.parametrize("pair", [("fib4", "fib4"), ("key3", "value3"), ("int8", "fp8"), ("affine4", "raw")])
def test_views_and_pages_are_those_sealed_at_once(pair: tuple[str, str], implementation: str) -> None:
    settings = layer_settings(*pair, policy=POLICY, implementation=implementation)
    (late, _), (plain, _) = make(settings, batch=2), make(settings, batch=2, beside=False)
    for at, count in enumerate((40, 1, 15, 1, 1, 20)):
        new = tokens(count, batch=2, seed=at)
        seen, expected = late.append(*new), plain.append(*new)
        for mine, theirs in zip(seen.decode(torch.float32), expected.decode(torch.float32), strict=True):
            assert torch.equal(mine, theirs)
    assert len(late.rows[1]) == 4
    assert digests(late) == digests(plain)
    assert late.flags == plain.flags
    late.verify()
    assert late.quarantine.records == ()


def test_keys_in_a_space() -> None:
    base = layer_settings(policy=POLICY)
    settings = replace(base, keys=replace(base.keys, space=KeySpace.of(3 * gaussian(HEADS, DIM, seed=7))))
    (late, _), (plain, _) = make(settings), make(settings, beside=False)
    for cache in (late, plain):
        cache.append(*tokens(40))
    assert digests(late) == digests(plain)


def test_appends_wait_only_for_pages_of_earlier_ones() -> None:
    cache, stream = make()
    with Waits() as waits:
        cache.append(*tokens(40))
        assert (waits.found, stream.waits) == ([], 0)
    copies = len(stream.copies)
    cache.append(*tokens(1))
    assert stream.waits == 1
    for _ in range(10):
        cache.append(*tokens(1))
    assert (stream.waits, len(stream.copies)) == (1, copies), "steps that seal nothing neither wait nor copy"


def test_bytes_go_to_the_host_in_one_copy_per_kind_of_page() -> None:
    cache, stream = make(layer_settings(policy=protecting(last_tokens_raw=5)), batch=2)
    cache.append(*tokens(100, batch=2))
    pages, notes = (into for into, _ in stream.copies)
    assert len(pages) == 2 * 5
    assert notes.dim() == 1


def test_pages_are_one_block_each() -> None:
    cache, _ = make()
    cache.append(*tokens(60))
    for page in cache.pages():
        tensors = [tensor for s in (*page.keys, *page.values) for _, tensor in s.codes.named() if tensor.numel()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        used = sum(tensor.nbytes for tensor in tensors)
        assert tensors[0].untyped_storage().nbytes() - used < 512
        assert {tensor.data_ptr() % min(16, tensor.nbytes & -tensor.nbytes) for tensor in tensors} == {0}


def test_what_is_under_way_is_counted() -> None:
    cache, _ = make()
    cache.append(*tokens(60))
    before = cache._inventory.meter.total
    blocks = sum(block.numel() for batch in cache._pending._batches for block in batch.blocks)
    cache.settle()
    tail = 2 * HEADS * 60 * DIM * 4
    assert before - cache._inventory.tables_nbytes >= tail + blocks
    assert cache.tail.length == 60 - 48


def test_nothing_is_counted_twice_in_a_pool() -> None:
    inventory, empty = Inventory(tracked=True), torch.zeros(1, HEADS, 0, DIM)
    memory = DevicePageMemory(inventory.slabs, CPU, LateStream(), Line())
    settings = layer_settings(policy=POLICY)
    cache = LayerCache(settings, empty, empty, Quarantine(), inventory, memory=memory)
    cache.append(*tokens(400))
    assert cache._pending is None, "a pool knows what there is"
    raw = 2 * HEADS * DIM * 4
    kept, pages = cache.tail.nbytes, sum(page.nbytes for page in cache.pages())
    blocks = sum(rounded(page.nbytes - 64) for page in cache.pages())
    assert inventory.meter.peak - inventory.tables_nbytes <= 400 * raw + max(blocks, pages + kept)


@pytest.mark.parametrize("use", ["report", "crop", "select", "copy", "verify", "to"])
def test_whatever_asks_for_pages_waits_for_them(use: str) -> None:
    cache, stream = make()
    cache.append(*tokens(60))
    match use:
        case "report":
            assert cache.nbytes
        case "crop":
            cache.crop(40)
        case "select":
            cache.select([0, 0])
        case "copy":
            cache = copy.deepcopy(cache)
        case "verify":
            cache.verify()
        case "to":
            cache.to(CPU)
    assert stream.waits
    plain, _ = make(beside=False)
    plain.append(*tokens(60))
    if use == "crop":
        plain.crop(40)
    if use == "select":
        plain.select([0, 0])
    assert digests(cache) == digests(plain)


class TestWhatCannotBeEncoded:
    def bad(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = tokens(32, batch=2)
        values[1, 0, 20, 3] = torch.inf
        return keys, values

    def test_it_is_kept_raw_by_the_next_append(self) -> None:
        cache, _ = make(layer_settings(), batch=2)
        cache.append(*self.bad())
        assert dict(cache.raw_reasons()) == {}
        view = cache.append(*tokens(1, batch=2))
        assert dict(cache.raw_reasons()) == {"not_encodable": HEADS * 16}
        plain, _ = make(layer_settings(), batch=2, beside=False)
        plain.append(*self.bad())
        for mine, theirs in zip(view.decode(torch.float32), plain.view().decode(torch.float32), strict=True):
            assert torch.equal(mine[:, :, :32], theirs)

    def test_fail_closed_refuses_the_next_append_and_changes_nothing(self) -> None:
        base = layer_settings()
        closed = base.values.profile.model_copy(update={"fallback": FallbackSettings(mode="fail_closed")})
        cache, _ = make(replace(base, values=replace(base.values, profile=closed)), batch=2)
        cache.append(*self.bad())
        before = cache.view().decode(torch.float32)
        for _ in range(2):
            with pytest.raises(EncodingError, match="raw fallback is not allowed"):
                cache.append(*tokens(1, batch=2))
        assert cache.length == 32
        assert all(torch.equal(a, b) for a, b in zip(before, cache.view().decode(torch.float32), strict=True))


def test_few_layers_are_under_way_at_a_time() -> None:
    line = Line()
    layers = [make(line=line)[0] for _ in range(5)]
    for layer in layers:
        layer.append(*tokens(60))
    assert [layer._pending is not None for layer in layers] == [False] * (5 - MOST_LAYERS) + [True] * MOST_LAYERS


def test_read_through_is_waited_for() -> None:
    settings = layer_settings(read_through=True)
    (late, stream), (plain, _) = make(settings), make(settings, beside=False)
    for count in (20, 1, 30):
        seen, expected = late.append(*tokens(count)), plain.append(*tokens(count))
        for mine, theirs in zip(seen.decode(torch.float32), expected.decode(torch.float32), strict=True):
            assert torch.equal(mine, theirs)
    assert stream.waits == 3
