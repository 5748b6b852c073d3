"""A cache's place in a pool: what each step takes is set aside before anything of the step is done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fibkv.errors import BudgetError
from fibkv.forecast import Growth
from fibkv.governor import Governor
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_stock import nbytes_of
from fibkv.ladder import RUNGS, Rung
from fibkv.pool import Claim, Pool


class Membership:
    """Of one cache in a pool with a budget.

    A step is one forward pass: the first compressed layer asks for all of them, so that a refusal leaves every layer
    as it was.
    """

    def __init__(self, pool: Pool, governor: Governor) -> None:
        self._governor = governor
        self._pool = pool
        self._claim = Claim(governor)
        self._beside = pool.inventory.open(self, is_layer=False)
        # Tokens of the step that was reserved last and has not begun.
        self._reserved: int | None = None
        self._rung: Rung = governor.level
        # By index of the layer, what layers still have to take in this step; in the first one, what they may have to.
        self._due: dict[int, Growth] = {}
        self._is_guess = False
        # By index of the layer, columns of its page table that have been stepped down for their age.
        self._stepped_down: dict[int, int] = {}

    @classmethod
    def of(cls, pool: Pool | None) -> Membership | None:
        """Membership in a pool, if there is one and it has a budget."""
        return None if pool is None or pool.governor is None else cls(pool, pool.governor)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs of the pool's ladder."""
        return self._governor.rungs

    def __deepcopy__(self, memo: dict[int, object]) -> Membership:
        return Membership(self._pool, self._governor)  # a fork has steps of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Membership.of, (self._pool,)

    def reserve(self, cache_layers: Sequence[Any], tokens: int) -> None:
        """Sets aside what a step of ``tokens`` tokens takes, for all compressed layers.

        Windows and states that are left to transformers are counted as they are now; they hardly grow.

        Args:
            cache_layers: of the cache; at least one is compressed and has a store. Those that are compressed and have
                none are taken to be like that one.
            tokens: per row.

        Raises:
            BudgetError: it does not fit.
        """
        layers = [layer for layer in cache_layers if isinstance(layer, CompressedLayer)]
        self._beside.set(sum(nbytes_of(layer) for layer in cache_layers if not isinstance(layer, CompressedLayer)))
        like = next(layer for layer in layers if layer.store is not None)
        for rung in self._governor.rungs_from_level():
            growths = {one.index: (one if one.store else like).growth(tokens, rung) for one in layers}
            # A rung below the level only where nothing else makes the step fit.
            if self._claim.may_fit(_nbytes(growths.values())):
                break
        self._set_aside(growths)
        self._is_guess = any(one.store is None for one in layers)
        # With the claim in place, so that the pressure is that of the step. The claim stands for the rung, or for one
        # that is more compact.
        self._rung = max(rung, self._governor.step(), key=RUNGS.index)
        self._reserved = tokens
        if self._pool.step_down_after is not None:
            self._step_down(layers, self._pool.step_down_after)

    def _step_down(self, layers: Sequence[CompressedLayer], after: int) -> None:
        """Brings old pages of one layer to the last rung: of the first layer that has any."""
        for layer in layers:
            store, done = layer.store, self._stepped_down.get(layer.index, 0)
            if store is None or not layer.settings.rungs:
                continue
            first = store.rows[0]
            old = [
                page for page in first[done : done + self._governor.pages_per_step] if page.stop <= store.length - after
            ]
            pages = [page for row in store.rows for page in row[done : done + len(old)]]
            if old and self._governor.step_down(pages):
                self._stepped_down[layer.index] = done + len(old)
                return
            self._stepped_down[layer.index] = min(done, len(first))  # a crop may have taken some

    def before(self, cache_layers: Sequence[Any], layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
        """Before a layer takes ``keys [B, H, t, d]`` and ``values``: sees to it that there is room.

        Raises:
            BudgetError: there is none.
        """
        layer.ensure_store(keys, values)
        tokens = keys.shape[2]
        if layer is next(one for one in cache_layers if isinstance(one, CompressedLayer)):
            if self._reserved != tokens or self._is_guess:
                self.reserve(cache_layers, tokens)
        elif self._is_guess:
            growth = layer.growth(tokens, self._rung)
            if growth.kept > self._due.get(layer.index, Growth(0, 0)).kept:
                self._set_aside({**self._due, layer.index: growth})
        self._reserved = None
        layer.seal_at(self._rung)

    @contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Sets so many bytes aside, beside those of a step, for what is made while the context lasts.

        Raises:
            BudgetError: they do not fit.
        """
        held = self._claim.nbytes
        self._claim.set(held + nbytes)
        try:
            yield
        finally:
            self._claim.set(held)

    def after(self, layer: CompressedLayer) -> None:
        """The layer has taken what it had to take."""
        self._due.pop(layer.index, None)
        if self._claim.nbytes:
            self._claim.set(_nbytes(self._due.values()))

    def _set_aside(self, growths: dict[int, Growth]) -> None:
        try:
            self._claim.set(_nbytes(growths.values()))
        except BudgetError:
            self._due, self._reserved = {}, None
            self._claim.set(0)
            raise
        self._due = growths


def _nbytes(growths: Collection[Growth]) -> int:
    """What a step takes at most: layers are at work one after another."""
    passing = max((growth.passing for growth in growths), default=0)
    return max(0, sum(growth.kept for growth in growths) + passing)
