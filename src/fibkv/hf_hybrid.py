"""One layer that holds keys and values beside a state: the former in compressed pages, the latter as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from fibkv.hf_layer import CompressedLayer
from fibkv.hf_stock import holds_convolutions_only, state_tensors
from fibkv.page_memory import PageMemories
from fibkv.quarantine import Quarantine
from fibkv.report import LayerReport
from fibkv.settings import CacheSettings


class CompressedHybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]  # None first
    """A layer of full attention and of linear attention, a state space or convolutions (Falcon-H1, Zamba2, Inkling).

    The attention half is a `CompressedLayer`, the other half transformers' `LinearAttentionLayer`, whose state has a
    fixed size. A recurrent state cannot be taken back, so neither can tokens; convolutions can record their past.

    Args:
        index: of the layer.
        settings: of the cache.
        quarantine: of the cache.
        memories: of the cache's pages.
        stock: transformers' layer, whose place it takes.
    """

    def __init__(
        self,
        index: int,
        settings: CacheSettings,
        quarantine: Quarantine,
        memories: PageMemories,
        stock: LinearAttentionAndFullAttentionLayer,
    ) -> None:
        super().__init__(index, settings, quarantine, memories)
        LinearAttentionLayer.__init__(self, number_of_states=stock.number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the attention half for two positional arguments, of the state for keywords, as transformers calls it."""
        if args:
            CompressedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # known once the layer has seen tokens
        """Whether `crop` puts both halves back as they were."""
        return holds_convolutions_only(self)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes tokens from both halves, as far as transformers' half can: `Cache.crop` refuses what it cannot."""
        LinearAttentionLayer.crop(self, int(tokens_to_remove))
        CompressedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``, in both halves."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]  # of type long
        CompressedLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        """Empties both halves."""
        LinearAttentionLayer.reset(self)
        CompressedLayer.reset(self)

    def offload(self) -> None:
        """Moves both halves to the CPU."""
        LinearAttentionLayer.offload(self)
        CompressedLayer.offload(self)

    def prefetch(self) -> None:
        """Moves both halves back to the device of their model."""
        LinearAttentionLayer.prefetch(self)
        CompressedLayer.prefetch(self)

    def report(self) -> LayerReport:
        """What both halves hold; the state counts as it is."""
        pages, states = super().report(), list(state_tensors(self))
        return pages.model_copy(
            update={
                "reason": f"{pages.reason}; its state of fixed size is left as it is",
                "elements": pages.elements + sum(state.numel() for state in states),
                "nbytes": pages.nbytes + sum(state.numel() * state.element_size() for state in states),
            }
        )
