"""Metrics of a pool, as a scrape sees them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fibkv import prometheus
from fibkv.pool import Pool
from tests.pool.layers import layer_in, tokens


def scraped(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    text = generate_latest(registry).decode()
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_what_a_scrape_says_is_what_the_pool_says() -> None:
    registry = CollectorRegistry()
    pool = Pool(1 << 20)
    prometheus.register(pool, "one", registry)
    unbounded = Pool()
    prometheus.register(unbounded, "two", registry)
    layer = layer_in(pool)
    layer.append(*tokens(64))
    assert pool.governor is not None
    while pool.governor._recode_oldest("q8"):
        pass
    pool.governor.step()
    found, stats = scraped(registry), pool.stats()
    assert found["fibkv_pool_allocated_bytes", "one"] == stats.allocated > 0
    assert found["fibkv_pool_budget_bytes", "one"] == 1 << 20
    assert ("fibkv_pool_budget_bytes", "two") not in found
    assert found["fibkv_pool_rung_pages", "one", "q8"] == 4
    assert found["fibkv_pool_rung_pages", "fp16", "one"] == 0
    assert found["fibkv_pool_recoded_pages_total", "one"] == 4
    assert found["fibkv_pool_level", "fp16", "one"] == 1
    assert found["fibkv_pool_transitions_total", "more_compact", "one"] == 0
    layer.crop(0)
    assert scraped(registry)["fibkv_pool_rung_pages", "one", "q8"] == 0
