"""A cache whose pages a worker seals: the same pages in the end, through all that a cache can do."""

from __future__ import annotations

import pytest
import torch

import fibkv
from fibkv.errors import ContractError
from fibkv.hf_argument import with_cache
from fibkv.store import MemoryStore
from tests.hf.models import build, prompt


def digests(cache: fibkv.Cache) -> list[list[str]]:
    return [[page.digest for page in layer.store.rows[0]] for layer in cache.layers]


def test_generation_ends_with_the_pages_of_what_it_was_given() -> None:
    """Raw tokens are read for longer, so tokens may differ; but not what is made of the keys that came."""
    model = build("llama")
    cache = fibkv.Cache(model, bits=4, tokens_per_page=16, sealing="deferred")
    with fibkv.attention(model):
        ids = model.generate(prompt(1, 150), **with_cache(cache), max_new_tokens=60, do_sample=False)
    assert ids.shape[1] == 210
    report = cache.report()
    assert report.materialized == 0
    assert [layer.pages for layer in report.layers] == [(209 - 64) // 16] * len(report.layers)
    assert cache.verify() == ()


def test_forks_crops_and_stores_see_what_sealing_at_once_makes() -> None:
    model, ids = build("llama"), prompt(1, 200)
    caches = [fibkv.Cache(model, bits=4, tokens_per_page=16, sealing=how) for how in ("immediate", "deferred")]
    saved = []
    with fibkv.attention(model), torch.no_grad():
        for cache in caches:
            # One prefill: later keys depend on when pages are there.
            model(ids[:, :190], **with_cache(cache))
            fork = cache.fork(2)
            fork.crop_to(130)
            saved.append((digests(cache), digests(fork), str(cache.report())))
            store = MemoryStore()
            assert cache.save(store, ids[:, :190]).failure is None
            restored = fibkv.restore(model, ids, store, bits=4, tokens_per_page=16, sealing="deferred")
            assert restored.get_seq_length() == 190
            assert digests(restored) == digests(cache)
    assert saved[0] == saved[1]


def test_a_pool_counts_what_there_is() -> None:
    model, ids = build("llama"), prompt(1, 200)
    totals = []
    for how in ("immediate", "deferred"):
        cache = fibkv.Cache(model, bits=4, tokens_per_page=16, budget="64MiB", sealing=how)
        with fibkv.attention(model), torch.no_grad():
            model(ids, **with_cache(cache))
        totals.append(cache.inventory.meter.total)
    assert totals[0] == totals[1]


def test_other_ways_are_refused() -> None:
    with pytest.raises(ContractError, match=r"Cache\.sealing: expected immediate or deferred, got 'lazy'"):
        fibkv.Cache(build("llama"), sealing="lazy")
