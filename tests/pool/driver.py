"""Steps of single layers under a governor, as a cache takes them (`fibkv.hf_pool`), without a model."""

from __future__ import annotations

from torch import Tensor

from fibkv.cache import LayerCache
from fibkv.forecast import forecast_append
from fibkv.pool import Claim, Pool


class Sequence:
    """One layer that grows in a pool."""

    def __init__(self, pool: Pool, layer: LayerCache) -> None:
        assert pool.governor is not None
        self.governor = pool.governor
        self.layer = layer
        self.claim = Claim(pool.governor)
        self.claimed = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """One step.

        Raises:
            BudgetError: it does not fit.
        """
        rung = self.governor.level
        growth = forecast_append(self.layer, self.layer.rungs[rung], keys.shape[2])
        needed = max(0, growth.kept + growth.passing)
        self.claim.set(needed)
        self.claimed += needed
        self.governor.step()
        self.layer.settings = self.layer.rungs[rung]
        self.layer.append(keys, values)
        self.claim.set(0)
