"""A cache that keeps the measuring contract of `fibkv.quality` with nothing of fibkv's codecs in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from fibkv.quality import CacheVariant
from fibkv.report import CacheReport, LayerReport

PAGE = 64


class RoundingCache(DynamicCache):
    """Rounds each key and value to ``levels`` steps of its largest component; 0 levels keep it as it came.

    ``read`` is False for a cache whose pages are not what attention reads: damage to them stays unseen.
    """

    def __init__(self, levels: int, read: bool = True) -> None:
        super().__init__()
        self._levels = levels
        self._read = read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rounded = (self._rounded(key_states), self._rounded(value_states))
        return super().update(*rounded, layer_idx, *args, **kwargs)

    def _rounded(self, vectors: Tensor) -> Tensor:
        if self._levels == 0:
            return vectors
        step = vectors.abs().amax(-1, keepdim=True) / self._levels
        return (vectors / step).round() * step

    def report(self) -> CacheReport:
        return CacheReport(
            layers=tuple(
                LayerReport(
                    layer=index,
                    kind="rounding",
                    compressed=True,
                    reason="fake",
                    tokens=layer.get_seq_length(),
                    pages=layer.get_seq_length() // PAGE,
                    elements=2 * layer.keys.numel(),
                    nbytes=2 * layer.keys.numel(),
                )
                for index, layer in enumerate(self.layers)
            ),
            tables_nbytes=0,
        )

    @contextmanager
    def corrupt_page(self, *, layer: int, row: int, page: int) -> Iterator[None]:
        if not self._read:
            yield
            return
        codes = self.layers[layer].keys[row, :, page * PAGE : (page + 1) * PAGE]
        intact = codes.clone()
        codes.copy_(intact.flip(1))
        yield
        codes.copy_(intact)


def variant(name: str, levels: int, *, read: bool = True) -> CacheVariant:
    return CacheVariant(
        name=name,
        title=f"rounded to {levels}" if levels else "as it came",
        make_cache=lambda _, *, read_through: RoundingCache(levels, read),
        attention=lambda _: nullcontext(),
    )
