"""A pool on a CUDA device: its budget holds, pages are re-encoded there, and counts are those of the device."""

from __future__ import annotations

import gc

import pytest
import torch

import fibkv
from fibkv.errors import BudgetError
from fibkv.forecast import page_nbytes
from fibkv.hf_argument import with_cache
from tests.hf.models import build, prompt

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_a_budget_holds_on_the_device(implementation: str) -> None:
    model = build("llama", torch.bfloat16).to(CUDA)
    ids = prompt(1, 700).to(CUDA)
    free = fibkv.Pool()
    cache = fibkv.Cache(model, pool=free, implementation=implementation)
    with fibkv.attention(model), torch.no_grad():
        model(ids, **with_cache(cache))
    alone = free.stats().allocated - free.stats().tables
    # Two sequences fit at 16 bits; four come, which at 4 bits leave room for what passes while one comes.
    pool = fibkv.Pool(budget=free.stats().tables + 6 * alone)
    caches = []
    with fibkv.attention(model), torch.no_grad():
        for _ in range(4):
            caches.append(fibkv.Cache(model, pool=pool, implementation=implementation))
            model(torch.randint_like(ids, 2, 199), **with_cache(caches[-1]))
        for cache in caches:
            logits = model(ids[:, :1], **with_cache(cache)).logits
            assert logits.isfinite().all()
            assert cache.verify() == ()
    stats = pool.stats()
    assert stats.recoded_pages > 0
    # Pages are re-encoded one at a time.
    assert stats.peak <= pool.governor.budget + max(entry.nbytes for entry in pool.inventory.entries())
    for entry in pool.inventory.entries():
        page, settings = entry.page(), caches[0].layers[entry.page().layer].store.rungs[entry.rung]
        assert entry.nbytes == page.nbytes == page_nbytes(settings, page.start, page.tokens, page.device)
    with pytest.raises(BudgetError), fibkv.attention(model), torch.no_grad():
        model(prompt(8, 4000).to(CUDA), **with_cache(fibkv.Cache(model, pool=pool)))
    del caches, cache, page, entry
    gc.collect()
    assert pool.stats().allocated == stats.tables


def test_what_leaves_a_pool_leaves_the_device() -> None:
    model = build("llama", torch.bfloat16).to(CUDA)
    ids = prompt(1, 3000).to(CUDA)
    pool = fibkv.Pool()
    with torch.no_grad():
        model(ids, **with_cache(fibkv.Cache(model, pool=pool)))
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = fibkv.Cache(model, pool=pool)
        model(ids, **with_cache(cache))
    gc.collect()
    held = pool.stats().allocated - pool.stats().tables
    on_device = torch.cuda.memory_allocated() - before
    pages = sum(layer.pages for layer in cache.report().layers)
    # Metadata of pages is no tensor; tails are rounded by the allocator.
    assert 0 <= on_device - (held - 64 * pages) <= 512 * 2 * 3
    del cache
    gc.collect()
    assert torch.cuda.memory_allocated() == before
