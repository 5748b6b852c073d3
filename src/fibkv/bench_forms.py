"""One layer's keys and values in one form, dense or in pages, in enough distinct copies to find them cold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fibkv.bench_settings import profile_choice
from fibkv.cache import LayerCache
from fibkv.page_memory import PageMemory
from fibkv.quarantine import Quarantine
from fibkv.settings import CacheSettings
from fibkv.slabs import Slabs
from fibkv.view import PageRows, View

Held = TypeVar("Held")
DAMAGED_TOKENS = 64
"""Tokens of dense keys that are put in reverse order for the poison test: as many as a page holds."""


class Form(ABC, Generic[Held]):
    """Keys and values of one layer. `take` hands out the copies in turn.

    Attributes:
        nbytes: that one copy stores.
        elements: of keys and values that it stands for.
    """

    def __init__(self, first: Held, nbytes: int, elements: int) -> None:
        self.nbytes = nbytes
        self.elements = elements
        self._copies = [first]
        self._next = 0

    @property
    def first(self) -> Held:
        """The original."""
        return self._copies[0]

    def __iter__(self) -> Iterator[Held]:
        return iter(self._copies)

    def copy(self, count: int) -> None:
        """Makes copies until there are ``count``; each has memory of its own."""
        self._copies += [self._copied() for _ in range(count - len(self._copies))]

    def take(self) -> Held:
        """The copy whose turn it is."""
        held = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return held

    @abstractmethod
    def _copied(self) -> Held:
        """A copy of the original."""

    @abstractmethod
    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, T, d]`` that the form stands for, float32, decoded by the reference kernels."""

    @abstractmethod
    def damaged(self) -> AbstractContextManager[None]:
        """Puts some keys of row 0 of the original in reverse order while the context lasts."""


class DenseForm(Form[tuple[Tensor, Tensor]]):
    """Dense ``keys`` and ``values [B, H, T, d]``."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__((keys, values), keys.nbytes + values.nbytes, keys.numel() + values.numel())

    def _copied(self) -> tuple[Tensor, Tensor]:
        keys, values = self.first
        return keys.clone(), values.clone()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """See `Form.decoded`."""
        keys, values = self.first
        return keys.float(), values.float()

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """See `Form.damaged`."""
        keys, _ = self.first
        start = (keys.shape[2] - DAMAGED_TOKENS) // 2
        span = keys[0, :, start : start + DAMAGED_TOKENS]
        span.copy_(span.flip(1))
        try:
            yield
        finally:
            span.copy_(span.flip(1))


class PagedForm(Form[View]):
    """A cache of one layer in compressed pages, with the default policy of `fibkv.Cache`."""

    def __init__(self, cache: LayerCache) -> None:
        elements = sum(t.shape[0] * t.shape[1] * t.shape[3] for t in (cache.tail.keys, cache.tail.values))
        # Codebooks and rotations are not in it: all layers of a process share them.
        super().__init__(cache.view(), cache.nbytes, elements * cache.length)
        self._cache = cache

    @classmethod
    def fill(
        cls, keys: Tensor, values: Tensor, profile: str, query_heads: int, implementation: str = "auto"
    ) -> PagedForm:
        """A cache that is given all tokens at once, as by a prefill.

        Args:
            keys: ``[B, H, T, d]``.
            values: likewise.
            profile: codec name, or ``keys/values``.
            query_heads: of the layer.
            implementation: of the kernels that will read it; pages lie in their order.
        """
        settings = CacheSettings.of(
            bits=None,
            profile=profile_choice(profile),
            policy=None,
            tokens_per_page=64,
            raw_dtype=None,
            read_through=False,
            implementation=implementation,
            layers=1,
            kv_heads=keys.shape[1],
            query_heads=query_heads,
        )
        cache = LayerCache(settings.for_layer(0, keys, values), keys, values, Quarantine())
        cache.append(keys, values)
        return cls(cache)

    def _copied(self) -> View:
        view = self.first
        memory = PageMemory(Slabs(), view.tail.keys.device)
        rows = PageRows(tuple(memory.place([page.copied() for page in row], view.implementation)) for row in view.rows)
        return View(rows, view.tail.map(Tensor.clone), view.length, view.implementation)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """See `Form.decoded`."""
        return self.first.decode(torch.float32, implementation="reference")

    def damaged(self) -> AbstractContextManager[None]:
        """See `Form.damaged`."""
        return self._cache.corrupted(row=0, page=len(self._cache.rows[0]) // 2)
