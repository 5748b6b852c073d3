"""Metrics of a pool for Prometheus: an optional extra.

from prometheus_client import start_http_server
fibkv.prometheus.register(pool)
start_http_server(9400)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fibkv.errors import FibkvError
from fibkv.ladder import RUNGS
from fibkv.pool import Pool
from fibkv.pool_stats import PoolStats
from fibkv.pressure import LEVELS

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise FibkvError("metrics need prometheus-client: pip install 'fibkv[metrics]'") from error

_Read = Callable[[PoolStats], float]
GAUGES: Mapping[str, tuple[str, _Read]] = {
    "allocated_bytes": ("Bytes that the pool holds, slack included.", lambda stats: stats.allocated),
    "slack_bytes": ("Bytes that are allocated and belong to nothing.", lambda stats: stats.slack),
    "peak_bytes": ("The most bytes that the pool ever held.", lambda stats: stats.peak),
    "claimed_bytes": ("Bytes set aside for steps under way.", lambda stats: stats.claimed),
    "layers": ("Caches of single layers.", lambda stats: stats.layers),
}
COUNTERS: Mapping[str, tuple[str, _Read]] = {
    "recoded_pages": ("Pages that were re-encoded.", lambda stats: stats.recoded_pages),
    "recoding_seconds": ("Time that re-encoding took.", lambda stats: stats.recoding_seconds),
    "refusals": ("Steps that did not fit.", lambda stats: stats.refusals),
    "damaged_pages": ("Pages that did not match their digests.", lambda stats: stats.damaged_pages),
    "shared_pages": ("Pages that were sealed and were there already.", lambda stats: stats.shared_pages),
}


class PoolCollector(Collector):
    """Reads a pool whenever it is scraped; nothing is kept up to date in between.

    Args:
        pool: to read.
        name: value of the label ``pool``, for processes with several.
    """

    def __init__(self, pool: Pool, name: str = "default") -> None:
        self._pool = pool
        self._name = name

    def collect(self) -> Iterator[Any]:
        """The families of metrics, as prometheus-client asks for them."""
        stats = self._pool.stats()
        for name, (text, gauge) in GAUGES.items():
            yield self._one(GaugeMetricFamily(f"fibkv_pool_{name}", text, labels=["pool"]), gauge(stats))
        for name, (text, counter) in COUNTERS.items():
            yield self._one(CounterMetricFamily(f"fibkv_pool_{name}", text, labels=["pool"]), counter(stats))
        yield from self._by_rung(stats)
        if stats.budget is not None:
            budget = GaugeMetricFamily("fibkv_pool_budget_bytes", "The budget.", labels=["pool"])
            yield self._one(budget, stats.budget)
        yield from self._pressure(stats)

    def _one(self, family: Any, value: float) -> Any:
        family.add_metric([self._name], value)
        return family

    def _by_rung(self, stats: PoolStats) -> Iterator[Any]:
        nbytes = GaugeMetricFamily("fibkv_pool_rung_bytes", "Bytes of pages by rung.", labels=["pool", "rung"])
        pages = GaugeMetricFamily("fibkv_pool_rung_pages", "Pages by rung.", labels=["pool", "rung"])
        found = {row.rung: row for row in stats.rungs}
        # Rungs without pages are zeros: a series that vanishes looks like a target that is down.
        for rung in (None, *RUNGS):
            labels = [self._name, rung or "none"]
            nbytes.add_metric(labels, found[rung].nbytes if rung in found else 0)
            pages.add_metric(labels, found[rung].pages if rung in found else 0)
        yield from (nbytes, pages)

    def _pressure(self, stats: PoolStats) -> Iterator[Any]:
        state = stats.pressure
        if state is None:
            return
        pressure = GaugeMetricFamily("fibkv_pool_pressure", "Smoothed occupancy of the budget.", labels=["pool"])
        yield self._one(pressure, state.pressure)
        level = GaugeMetricFamily("fibkv_pool_level", "1 for the level of new pages.", labels=["pool", "level"])
        for name in LEVELS:
            level.add_metric([self._name, name], float(name == state.level))
        yield level
        moves = CounterMetricFamily("fibkv_pool_transitions", "Changes of the level.", labels=["pool", "to"])
        moves.add_metric([self._name, "more_compact"], state.upgrades)
        moves.add_metric([self._name, "less_compact"], state.downgrades)
        yield moves


def register(pool: Pool, name: str = "default", registry: Any = REGISTRY) -> PoolCollector:
    """Registers a pool's metrics; give the collector to ``registry.unregister`` to take them back."""
    collector = PoolCollector(pool, name)
    registry.register(collector)
    return collector
