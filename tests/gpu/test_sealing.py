"""Sealing on a CUDA device: on a stream of its own, without a wait, into the pages that the CPU would make."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import transformers as tf

import fibkv
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.codecs import codec_for
from fibkv.errors import EncodingError
from fibkv.hf_argument import with_cache
from fibkv.inventory import Inventory
from fibkv.kernels.refusals import checked_later
from fibkv.page_memory import DevicePageMemory, PageMemories
from fibkv.parameters import named_parameters
from fibkv.quarantine import Quarantine
from fibkv.sealing import LayerSettings
from tests.gpu.conftest import NoWaits, detect_waits
from tests.hf.models import build, prompt
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting

CUDA = torch.device("cuda", 0)
POLICY = protecting(first_tokens_raw=4, last_tokens_raw=5)
CODECS = ["fib4", "key3", "value3", "fib2", "trellis2", "affine4", "int8", "fp8", "raw"]


def make(settings: LayerSettings, *, batch: int = 1) -> LayerCache:
    empty = torch.zeros(batch, HEADS, 0, DIM, device=CUDA)
    memory = PageMemories(Inventory()).on(CUDA)
    assert isinstance(memory, DevicePageMemory)
    return LayerCache(settings, empty, empty, Quarantine(), memory=memory)


def tokens(count: int, *, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = (gaussian(batch, HEADS, count, DIM, seed=seed + part) for part in (0, 100))
    keys, values = (tensor.to(CUDA) for tensor in made)
    return keys, values


def digests(cache: LayerCache) -> list[list[str]]:
    return [[page.digest for page in row] for row in cache.rows]


@pytest.mark.parametrize("axis", ["per_token", "per_channel"])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("name", CODECS)
def test_encoding_waits_for_nothing(name: str, implementation: str, axis: str, no_waits: NoWaits) -> None:
    codec, rows = codec_for(named_parameters(name, DIM, "f16"), axis), gaussian(2, 16, DIM).to(CUDA)
    expected = codec.encode(rows, implementation=implementation)
    with no_waits(), checked_later() as checks:
        codes = codec.encode(rows, implementation=implementation)
    assert not checks.any()
    for (_, mine), (_, theirs) in zip(codes.named(), expected.named(), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_refused_at_once_is_found_later(name: str, bad: float) -> None:
    codec, rows = codec_for(named_parameters(name, DIM, "f16"), "per_token"), gaussian(2, 8, DIM).to(CUDA)
    rows[1, 3, 5] = bad
    with checked_later() as checks:
        codec.encode(rows, implementation="triton")
    try:
        codec.encode(rows, implementation="triton")
    except EncodingError:
        assert checks.any()
    else:
        assert not checks.any()


def test_an_append_that_seals_waits_for_nothing(no_waits: NoWaits) -> None:
    settings = layer_settings("key3", "value3", POLICY, implementation="triton")
    make(settings).append(*tokens(60))  # makes tables and kernels
    cache, new = make(settings), tokens(60)
    torch.cuda.synchronize()
    with no_waits():
        cache.append(*new)
    assert cache._pending is not None
    cache.append(*tokens(1))
    assert len(cache.rows[0]) == 3
    cache.verify()
    assert cache.quarantine.records == ()


@pytest.mark.parametrize("pair", [("fib4", "fib4"), ("key3", "value3"), ("int8", "fp8"), ("affine4", "trellis2")])
def test_pages_are_those_that_are_waited_for(pair: tuple[str, str]) -> None:
    settings = layer_settings(*pair, POLICY, implementation="triton")
    late = make(settings, batch=2)
    empty = torch.zeros(2, HEADS, 0, DIM, device=CUDA)
    plain = LayerCache(settings, empty, empty, Quarantine())
    for at, count in enumerate((200, 1, 15, 1, 1, 20)):
        new = tokens(count, batch=2, seed=at)
        seen, expected = late.append(*new), plain.append(*new)
        for mine, theirs in zip(seen.decode(torch.float32), expected.decode(torch.float32), strict=True):
            assert torch.equal(mine, theirs)
    assert digests(late) == digests(plain)
    assert late.flags == plain.flags
    late.append(*tokens(20, batch=2, seed=9))
    fork = copy.deepcopy(late)
    fork.append(*tokens(20, batch=2, seed=10))
    assert len(fork.rows[0]) > len(late.rows[0])
    assert [row[: len(late.rows[0])] for row in digests(fork)] == digests(late)


def test_sealing_runs_beside_the_model_and_behind_what_it_needs() -> None:
    """Keys that are still being computed when sealing begins are those that are sealed; the model does not wait."""
    settings = layer_settings(policy=POLICY, implementation="triton")
    make(settings).append(*tokens(400))
    cache, (keys, values) = make(settings), tokens(400)
    busy = torch.randn(4096, 4096, device=CUDA)
    torch.cuda.synchronize()
    slow = torch.zeros_like(keys)
    for _ in range(20):
        busy = (busy @ busy).tanh()
    slow += keys
    cache.append(slow, values)
    pending = cache._pending
    assert pending is not None
    assert not pending._mark.query(), "sealing cannot be done before the keys are"
    plain = make(settings)
    plain.append(keys, values)
    assert digests(cache) == digests(plain)


def test_a_cache_that_goes_while_pages_are_under_way_leaves_memory_alone() -> None:
    settings = layer_settings(policy=POLICY, implementation="triton")
    make(settings).append(*tokens(400))
    new = tokens(400)
    for _ in range(20):
        cache = make(settings)
        cache.append(*new)
        del cache
        gc.collect()
        canary = [torch.full((1 << 14,), 7, dtype=torch.uint8, device=CUDA) for _ in range(64)]
        torch.cuda.synchronize()
        assert all(bool((block == 7).all()) for block in canary)


def test_bytes_are_those_of_the_allocator() -> None:
    settings = layer_settings("int8", "int8", protecting(), implementation="triton")
    make(settings).append(*tokens(160))
    cache, new = make(settings), tokens(160)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    cache.append(*new)
    cache.settle()
    gc.collect()
    assert cache.tail.length == 0
    held = cache.nbytes - cache.metadata_nbytes
    assert torch.cuda.memory_allocated() - before == held


def test_a_model_reads_pages_as_the_reference_does() -> None:
    model = build("llama", torch.bfloat16).to(CUDA)
    ids = prompt(2, 160).to(CUDA)
    logits_of = {}
    for implementation in ("triton", "reference"):
        cache = fibkv.Cache(model, bits=4, implementation=implementation)
        with fibkv.attention(model), torch.no_grad():
            logits = [model(ids[:, :150], **with_cache(cache)).logits[:, -1:]]
            logits += [model(ids[:, at : at + 1], **with_cache(cache)).logits for at in range(150, 160)]
        logits_of[implementation] = torch.cat(logits, 1).float()
        report = cache.report()
        assert report.materialized == 0
        assert cache.verify() == ()
        assert [layer.pages for layer in report.layers] == [2, 2, 2]
    error = (logits_of["triton"] - logits_of["reference"]).square().mean().sqrt()
    assert error <= 0.05 * logits_of["reference"].square().mean().sqrt()


def test_steps_that_seal_nothing_wait_for_nothing(no_waits: NoWaits) -> None:
    settings = layer_settings("key3", "value3", POLICY, implementation="triton")
    cache = make(settings)
    query = gaussian(1, 4, 1, DIM).to(CUDA)
    scores = Scores(scale=0.125)
    new = [tokens(1, seed=at) for at in range(8)]
    cache.append(*tokens(100))
    for step in new[:2]:
        attend(query, cache.append(*step), scores)
    torch.cuda.synchronize()
    with no_waits():
        for step in new[2:]:
            attend(query, cache.append(*step), scores)


@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_is_compiled_behind_a_warm_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    compiled: list[str] = []
    model = build("llama", torch.bfloat16).to(CUDA)
    cache = fibkv.Cache(model, bits=4)
    ids = prompt(rows, 300).to(CUDA)
    mask = torch.ones_like(ids)
    mask[0, : 7 * (rows - 1)] = 0
    with fibkv.attention(model):
        cache.warm_up(model, rows=rows)

        def note(**about: object) -> None:
            compiled.append(about["fn"].name)

        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
        model.generate(ids, attention_mask=mask, **with_cache(cache), max_new_tokens=150, do_sample=False)
    assert compiled == []
    assert cache.report().layers[0].pages == 6 * rows


def waits_of_steps(model: torch.nn.Module, cache: object, ids: torch.Tensor, steps: int) -> int:
    """How often torch waited for the device in steps of a model behind a prompt."""
    with torch.no_grad():
        model(ids, **with_cache(cache))
        for _ in range(3):
            model(ids[:, :1], **with_cache(cache))
        torch.cuda.synchronize()
        detect_waits("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                for _ in range(steps):
                    model(ids[:, :1], **with_cache(cache))
        finally:
            detect_waits("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)


@pytest.mark.parametrize("offloading", [False, True])
def test_a_model_waits_no_more_than_with_a_cache_of_transformers(offloading: bool) -> None:
    """Over steps of which one seals a page in every layer."""
    model = build("llama", torch.bfloat16).to(CUDA)
    ids = prompt(1, 300).to(CUDA)
    expected = waits_of_steps(model, tf.DynamicCache(config=model.config), ids, 70)
    cache = fibkv.Cache(model, bits=4, offloading=offloading)
    with fibkv.attention(model):
        cache.warm_up(model)
        assert waits_of_steps(model, cache, ids, 70) == expected
    assert cache.report().layers[0].pages == 4
