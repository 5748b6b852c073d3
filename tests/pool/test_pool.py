"""Pools: what is counted, what is shared, what is re-encoded, what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import fibkv
from fibkv.attend import Scores, attend
from fibkv.errors import BudgetError, ContractError, DigestMismatch
from fibkv.forecast import forecast_append
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import attention
from fibkv.ladder import Ladder
from fibkv.page import METADATA_NBYTES
from fibkv.pool import Pool, budget_nbytes
from fibkv.pressure import PressureConfig
from fibkv.recode import recode
from fibkv.store.memory import MemoryStore
from tests.hf.models import build, prompt
from tests.pages.helpers import gaussian
from tests.pool.layers import bytes_held, layer_in, rung_of, rungs, tokens

BIG = 1 << 40
LADDER = Ladder(q2=("key2", "fib2"))


def filled(pool: Pool, count: int, seed: int = 0, implementation: str = "auto") -> object:
    layer = layer_in(pool, implementation=implementation)
    layer.append(*tokens(count, seed))
    return layer


class TestBytes:
    @pytest.mark.parametrize("implementation", ["reference", "auto"])
    def test_every_byte_is_counted(self, implementation: str) -> None:
        pool = Pool(BIG, ladder=LADDER)
        layers = [filled(pool, 50, 10 * i, implementation) for i in range(3)]
        layers.append(copy.deepcopy(layers[0]))
        layers[3].append(*tokens(40, 7))
        layers[1].crop(25)
        stats = pool.stats()
        pages = {id(page): page for layer in layers for page in layer.pages()}
        metadata = METADATA_NBYTES * len(pages)
        assert stats.allocated - stats.slack - stats.tables == bytes_held(*layers) + metadata
        assert stats.layers == 4
        assert stats.peak >= stats.allocated

    def test_bytes_return_to_zero_without_the_collector(self) -> None:
        pool = Pool(BIG, ladder=LADDER)
        model = build("llama")
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad(), attention(model):
            model(prompt(tokens=200), **with_cache(cache))
            fork = cache.fork(2)
            model(prompt(2, 10, 1), **with_cache(fork))
        assert pool.stats().allocated > 0
        del cache, fork
        stats = pool.stats()
        assert stats.allocated == stats.tables
        assert (stats.slack, stats.claimed, stats.layers, stats.rungs) == (0, 0, 0, ())

    def test_an_append_takes_no_more_than_was_forecast(self) -> None:
        pool = Pool(BIG, ladder=LADDER)
        layer = layer_in(pool)
        for step, count in enumerate([40, 1, 6, 1, 1, 100, 1, 15, 1, 16]):
            pool.inventory.meter._peak = before = pool.inventory.allocated
            growth = forecast_append(layer, layer.settings, count)
            layer.append(*tokens(count, step))
            after = pool.inventory.allocated
            assert after - before <= growth.kept
            assert pool.inventory.meter.peak - before <= growth.kept + growth.passing
            # Not much more either: two grains for pages that are sealed together.
            assert growth.kept <= after - before + 2 * 4096 + 1024


class TestSharing:
    def test_forks_cost_their_tails_only(self) -> None:
        pool = Pool(BIG)
        layer = filled(pool, 10 * 16 + 5)
        before = pool.stats().allocated
        forks = [copy.deepcopy(layer) for _ in range(4)]
        assert pool.stats().allocated - before == 4 * (layer.tail.nbytes)
        assert len({id(page) for one in forks for page in one.pages()}) == 10

    def test_equal_pages_are_kept_once(self) -> None:
        pool = Pool(BIG)
        model = build("llama")
        caches = []
        with torch.no_grad():
            for _ in range(3):
                caches.append(fibkv.Cache(model, pool=pool))
                model(prompt(tokens=250), **with_cache(caches[-1]))
        stats = pool.stats()
        distinct = {id(page) for cache in caches for layer in cache.layers for page in layer.store.pages()}
        assert len(distinct) == sum(row.pages for row in stats.rungs) == 3 * 2
        assert stats.shared_pages == 2 * 3 * 2

    def test_pages_of_another_order_in_memory_are_not_shared(self) -> None:
        pool = Pool(BIG)
        one, other = filled(pool, 64, implementation="reference"), filled(pool, 64)
        assert [a.digest for a in one.pages()] == [b.digest for b in other.pages()]
        assert pool.stats().shared_pages == (4 if one.implementation == other.implementation else 0)
        query = gaussian(1, 4, 1, 64)
        for layer in (one, other):
            assert torch.isfinite(attend(query, layer.view(), Scores(0.125))[0]).all()


class TestRecoding:
    def test_oldest_first_and_only_what_is_needed(self) -> None:
        pool = Pool(200_000, ladder=LADDER)
        first, second = filled(pool, 16 * 6), filled(pool, 16 * 6, 5)
        held = pool.stats().allocated
        pool.governor.budget = held + 20_000
        pool.governor.claim(30_000)
        assert rung_of(pool, second) == ["fp16"] * 6
        done = rung_of(pool, first)
        assert done == sorted(done, key=lambda rung: rung != "q8")
        assert 0 < done.count("q8") < 6
        assert pool.stats().allocated + 30_000 <= pool.governor.budget

    def test_all_who_hold_a_page_get_the_new_one(self) -> None:
        pool = Pool(200_000, ladder=LADDER)
        layer = filled(pool, 64)
        fork = copy.deepcopy(layer)
        snapshot = layer.view()
        (before, _) = snapshot.decode(torch.float32)
        while pool.governor._recode_oldest("q4"):
            pass
        assert rung_of(pool, layer) == rung_of(pool, fork) == ["q4"] * 4
        assert [id(page) for page in layer.pages()] == [id(page) for page in fork.pages()]
        assert torch.equal(snapshot.decode(torch.float32)[0], before), "a snapshot goes on reading what it saw"
        assert not torch.equal(layer.view().decode(torch.float32)[0], before)
        layer.verify()
        assert not layer.quarantine.records

    @pytest.mark.parametrize("implementation", ["reference", "auto"])
    def test_a_recoded_page_is_the_page_sealed_from_what_it_held(self, implementation: str) -> None:
        pool = Pool(BIG)
        layer = filled(pool, 16, implementation=implementation)
        (page,) = layer.pages()
        for rung in ("q8", "q4", "q2"):
            keys, values = layer.view().decode(torch.float32)
            other = layer_in(Pool(BIG), rung, implementation=implementation)
            other.append(keys, values)
            (expected,) = other.pages()
            new = recode(page, rungs(implementation)[rung], pool.inventory.slabs)
            assert new.digest == expected.digest
            layer.replace(page, new)
            (page,) = layer.pages()
            assert page is new

    def test_protected_vectors_keep_their_values(self) -> None:
        model = build("llama", torch.bfloat16)
        pool = Pool("1GiB", ladder=LADDER)
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            model(prompt(tokens=300), **with_cache(cache))
        store = cache.layers[0].store
        before = store.view().decode(torch.bfloat16)
        for rung in ("q8", "q4", "q2"):
            while pool.governor._recode_oldest(rung):
                pass
            assert set(rung_of(pool, store)) == {rung}
            for old, new in zip(before, store.view().decode(torch.bfloat16), strict=True):
                assert torch.equal(new[:, :, :4], old[:, :, :4])
                assert not torch.equal(new[:, :, 4:64], old[:, :, 4:64])
                tail = store.tail.length
                assert torch.equal(new[:, :, -tail:], old[:, :, -tail:])

    def test_a_damaged_page_gets_no_new_digest(self) -> None:
        pool = Pool(BIG, ladder=LADDER)
        layer = filled(pool, 64)
        with layer.corrupted(0, 1):
            with pytest.raises(DigestMismatch):
                recode(layer.rows[0][1], rungs()["q4"], pool.inventory.slabs)
            while pool.governor._recode_oldest("q4"):
                pass
            assert rung_of(pool, layer) == ["q4", "fp16", "q4", "q4"]
            assert pool.stats().damaged_pages == 1
            layer.verify()
            assert len(layer.quarantine.records) == 1

    def test_caches_with_codecs_of_their_own_are_left_alone(self) -> None:
        model = build("llama")
        alone = fibkv.Cache(model, bits=4)
        pool = Pool("2MiB", ladder=LADDER)
        pinned, other = fibkv.Cache(model, bits=4, pool=pool), fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            for cache, seed in ((alone, 0), (pinned, 0), (other, 1)):
                model(prompt(tokens=400, seed=seed), **with_cache(cache))
        pool.governor.budget = pool.stats().allocated + 1000
        pool.governor.claim(100_000)
        for one, same in zip(alone.layers, pinned.layers, strict=True):
            assert [page.digest for page in one.store.pages()] == [page.digest for page in same.store.pages()]
        assert {row.rung for row in pool.stats().rungs} >= {None, "q8"}

    def test_old_pages_are_stepped_down_by_age(self) -> None:
        model = build("llama")
        pool = Pool("64MiB", ladder=LADDER, pages_per_step=2, step_down_after=200)
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            model(prompt(2, 400), **with_cache(cache))
            for step in range(20):
                model(prompt(2, 1, step), **with_cache(cache))
            for layer in cache.layers:
                assert rung_of(pool, layer.store) == ["q2"] * 3 + ["fp16"] * 2
            cache.crop_to(100)
            model(prompt(2, 300, 3), **with_cache(cache))
            for step in range(6):
                model(prompt(2, 1, step), **with_cache(cache))
        for layer in cache.layers:
            found = [
                (page.stop, rung) for page, rung in zip(layer.store.rows[1], rung_of(pool, layer.store), strict=True)
            ]
            assert all((rung == "q2") == (stop <= 200) for stop, rung in found), found
        with pytest.raises(ContractError, match="step_down_after"):
            Pool(step_down_after=100)

    def test_new_pages_are_sealed_at_the_level(self) -> None:
        model = build("llama")
        config = PressureConfig.aggressive()
        pool = Pool("64MiB", pressure=config)
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            model(prompt(tokens=200), **with_cache(cache))
        assert [row.rung for row in pool.stats().rungs] == ["q8"]
        assert "2 pages q8" in cache.report().layers[0].reason


class TestRefusals:
    def test_a_refused_step_leaves_the_cache_as_it_was(self) -> None:
        model = build("llama")
        pool = Pool("1MiB", ladder=LADDER)
        cache, other = fibkv.Cache(model, pool=pool), fibkv.Cache(model, pool=pool)
        with torch.no_grad(), attention(model):
            model(prompt(tokens=100), **with_cache(cache))
            model(prompt(tokens=60, seed=1), **with_cache(other))
            before, held = cache.fork(), cache.report()
            with pytest.raises(BudgetError, match=r"expected room for .* in 1 MiB, got .* held .* retry"):
                model(prompt(tokens=3000, seed=2), **with_cache(cache))
            assert cache.report() == held
            assert pool.stats().refusals == 1
            assert pool.stats().claimed == 0
            del other
            step = prompt(tokens=1, seed=3)
            expected = model(step, **with_cache(before)).logits
            assert torch.equal(model(step, **with_cache(cache)).logits, expected)

    def test_a_refused_first_step_leaves_an_empty_cache(self) -> None:
        model = build("llama")
        pool = Pool("400KiB")
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            with pytest.raises(BudgetError):
                model(prompt(tokens=3000), **with_cache(cache))
            assert cache.get_seq_length() == 0
            model(prompt(tokens=10), **with_cache(cache))
        assert cache.get_seq_length() == 10

    def test_room_can_be_reserved_before_the_step(self) -> None:
        model = build("llama")
        pool = Pool("1MiB", ladder=LADDER)
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            cache.reserve(100)  # the shapes are not known yet
            model(prompt(tokens=100), **with_cache(cache))
            with pytest.raises(BudgetError):
                cache.reserve(10_000)
            assert pool.stats().claimed == 0
            cache.reserve(50)
            assert pool.stats().claimed > 0
            samples = pool.stats().pressure.samples
            model(prompt(tokens=50, seed=1), **with_cache(cache))
        assert pool.stats().claimed == 0
        assert pool.stats().pressure.samples == samples, "a reserved step is one step"

    def test_nothing_is_re_encoded_for_a_step_that_cannot_fit(self) -> None:
        pool = Pool(BIG, ladder=LADDER)
        layer = filled(pool, 160)
        pool.governor.budget = pool.stats().allocated
        with pytest.raises(BudgetError):
            pool.governor.claim(10 * pool.governor.budget)
        assert set(rung_of(pool, layer)) == {"fp16"}

    def test_claims_of_caches_that_are_gone_are_given_up(self) -> None:
        model = build("llama")
        pool = Pool("1MiB")
        cache = fibkv.Cache(model, pool=pool)
        with torch.no_grad():
            model(prompt(tokens=100), **with_cache(cache))
        cache.reserve(100)
        assert pool.stats().claimed > 0
        del cache
        pool.governor.claim(1)
        assert pool.stats().claimed == 1

    def test_settings(self) -> None:
        model = build("llama")
        for budget in ("nonsense", "0B", "120%", -1):
            with pytest.raises(ContractError, match="budget"):
                Pool(budget)
        with pytest.raises(ContractError, match="either a pool or a budget"):
            fibkv.Cache(model, pool=Pool(), budget="1GiB")
        with pytest.raises(ContractError, match="pages_per_step"):
            Pool("1GiB", pages_per_step=0)
        with pytest.raises(ContractError, match="nosuch"):
            fibkv.Cache(model, pool=Pool("1GiB", ladder=Ladder(q4=("nosuch", "fib4"))))
        assert budget_nbytes("50%") == pytest.approx(budget_nbytes("100%") / 2, rel=0.1)
        assert fibkv.Cache(model, budget="1GiB").pool.stats().budget == 1 << 30

    def test_a_pool_without_a_budget_counts(self) -> None:
        pool = Pool()
        cache = fibkv.Cache(build("llama"), pool=pool)
        with torch.no_grad():
            build("llama")(prompt(tokens=100), **with_cache(cache))
        stats = pool.stats()
        assert stats.budget is None
        assert stats.pressure is None
        assert stats.occupancy is None
        assert stats.allocated > 0


def test_caches_of_a_pool_can_be_copied_and_sent() -> None:
    model = build("llama")
    pool = Pool("8MiB")
    cache = fibkv.Cache(model, pool=pool)
    with torch.no_grad(), attention(model):
        model(prompt(tokens=150), **with_cache(cache))
        sent = pickle.loads(pickle.dumps(cache))
        step = prompt(tokens=1, seed=1)
        assert cache.fork().pool is pool
        assert sent.pool is not pool
        assert sent.pool.stats().budget == 8 << 20
        expected = model(step, **with_cache(cache)).logits
        assert torch.equal(model(step, **with_cache(sent)).logits, expected)


def test_a_stored_prefix_is_restored_into_a_pool_if_it_fits() -> None:
    model = build("llama")
    ids = prompt(tokens=400)[0]
    saved = fibkv.Cache(model, bits=4)
    store = MemoryStore()
    with torch.no_grad():
        model(ids[None], **with_cache(saved))
        saved.save(store, ids)
        pool = Pool("4MiB")
        caches = [fibkv.restore(model, ids, store, bits=4, pool=pool) for _ in range(3)]
        assert [cache.restored.tokens for cache in caches] == [399] * 3
        # Five of the six pages are those that are there already; the crop to 399 tokens touched none of them.
        assert pool.stats().shared_pages > 0
        assert len({id(page) for cache in caches for page in cache.layers[0].store.pages()}) == 5
        small = Pool("100KiB")
        missed = fibkv.restore(model, ids, store, bits=4, pool=small)
        assert missed.restored.tokens == 0
        assert "memory budget" in missed.restored.failures[0]
        assert small.stats().allocated <= 100 << 10


def test_windows_that_are_left_to_transformers_count() -> None:
    config = Gemma3TextConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    pool = Pool("4MiB")
    cache = fibkv.Cache(model, pool=pool)
    with torch.no_grad():
        model(prompt(tokens=100), **with_cache(cache))
        model(prompt(tokens=1), **with_cache(cache))
    report, stats = cache.report(), pool.stats()
    assert sum(layer.nbytes for layer in report.layers if not layer.compressed) > 0
    assert sum(layer.nbytes for layer in report.layers) == stats.allocated - stats.slack - stats.tables
    del cache
    assert pool.stats().allocated == pool.stats().tables
