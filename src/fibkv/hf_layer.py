"""One layer of a transformers cache in compressed pages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fibkv.cache import LayerCache
from fibkv.errors import ModelError
from fibkv.forecast import Growth, forecast_append
from fibkv.handle import Handle, Source
from fibkv.ladder import Rung
from fibkv.page_memory import PageMemories
from fibkv.quarantine import Quarantine
from fibkv.report import LayerReport
from fibkv.settings import CacheSettings

# Newest tokens whose sealing waits while transformers records the past: more than assisted decoding drafts at once.
ROLLBACK_TOKENS = 128


class CompressedLayer(CacheLayerMixin):
    """A layer of full attention in compressed pages.

    The first update of an empty layer returns the tensors it was given: prefill attends exactly. Later ones return
    handles: the past as stored, the new tokens exactly (all through the codec with ``read_through``).

    A `crop` keeps what is stored of the tokens before it, bit for bit. After `activate_past_recording`, which assisted
    decoding calls, a crop of at most `ROLLBACK_TOKENS` tokens of the last update leaves no trace at all: the pages
    are those of a cache that never saw them.

    Args:
        index: of the layer.
        settings: of the cache.
        quarantine: of the cache.
        memories: of the cache's pages.
        latent_widths: see `fibkv.hf_model.ModelPlan`; tensors of other widths are taken for keys and values.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        index: int,
        settings: CacheSettings,
        quarantine: Quarantine,
        memories: PageMemories,
        latent_widths: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories = memories
        self.inventory = memories.inventory
        self.index = index
        self.settings = settings
        self.quarantine = quarantine
        self.latent_widths = latent_widths
        self.is_latent = False
        self.record_past = False
        self.materialized = 0
        self.store: LayerCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the store for tensors like ``key_states [B, H, t, d]`` and ``value_states [B, H, t, d_value]``."""
        widths = (key_states.shape[-1], value_states.shape[-1])
        self.is_latent = key_states.shape[1] == 1 and widths == self.latent_widths
        rungs = self.settings.rungs_of_layer(self.index, key_states, value_states, is_latent=self.is_latent)
        settings = (
            next(iter(rungs.values()))
            if rungs
            else self.settings.for_layer(self.index, key_states, value_states, is_latent=self.is_latent)
        )
        memory = self.memories.on(key_states.device)
        self.store = LayerCache(settings, key_states, value_states, self.quarantine, self.inventory, rungs, memory)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002 - older releases pass a dict, none of it is needed
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns what attention reads."""
        store = self.ensure_store(key_states, value_states)
        was_empty = store.length == 0
        view = store.append(key_states, value_states, hold_back=self._hold_back)
        if was_empty and not self.settings.read_through:
            return key_states, value_states
        source = Source(view, key_states.dtype, self._count)
        return Handle(source, "key"), Handle(source, "value")

    def ensure_store(self, keys: Tensor, values: Tensor) -> LayerCache:
        """The store; a new one if there is none, or an empty one for other tensors than these."""
        if self.store is None or (self.store.length == 0 and not self.store.tail.fits(keys, values)):
            self.lazy_initialization(keys, values)
        assert self.store is not None
        return self.store

    def seal_at(self, rung: Rung | None) -> None:
        """Seals new pages at a rung from now on; without a ladder, or with None, as before."""
        if self.store is not None and rung in self.store.rungs:
            self.store.settings = self.store.rungs[rung]

    def growth(self, tokens: int, rung: Rung | None) -> Growth:
        """What an append of so many tokens takes when pages are sealed at a rung."""
        store = self.store
        assert store is not None
        settings = store.settings if rung is None else store.rungs.get(rung, store.settings)
        return forecast_append(store, settings, tokens, self._hold_back)

    @property
    def _hold_back(self) -> int:
        return ROLLBACK_TOKENS if self.record_past else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length with the coming queries, offset 0): all tokens are kept."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.store is None else self.store.length

    @property
    def num_rows(self) -> int:
        """Batch rows held; 0 for an empty layer, which takes any batch."""
        return self.store.batch if self.store is not None and self.store.length else 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on crops of the newest tokens leave no trace, see the class."""
        self.record_past = True

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens (0 or negative, as transformers calls it)."""
        # Assisted decoding of older releases counts in a tensor.
        remove = int(tokens_to_remove)
        if remove > 0:
            raise ModelError(f"crop: expected 0 or minus the number of tokens to remove, got {remove}")
        if self.store is not None:
            self.store.crop(max(0, self.store.length + remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``."""
        if self.store is not None:
            self.store.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; pages are shared."""
        if self.store is not None:
            self.store.select([row for row in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that ``indices`` (or a boolean mask) name."""
        if self.store is not None:
            rows = torch.arange(self.store.batch)[indices.cpu()]
            self.store.select(rows.tolist())

    def reset(self) -> None:
        """Empties the layer."""
        self.store = None
        self.is_initialized = False

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        if self.store is not None:
            self.store.to(torch.device("cpu"), parked=True)

    def prefetch(self) -> None:
        """Moves the layer back to the device of its model."""
        if self.store is not None:
            self.store.to(self.device)

    def report(self) -> LayerReport:
        """What the layer holds."""
        store = self.store
        kind = type(self).__name__
        if store is None:
            return LayerReport(
                layer=self.index, kind=kind, compressed=True, reason="empty", tokens=0, pages=0, elements=0, nbytes=0
            )
        elements = sum(t.shape[0] * t.shape[1] * t.shape[3] for t in (store.tail.keys, store.tail.values))
        raw_elements, raw_nbytes = store.raw_parts()
        return LayerReport(
            layer=self.index,
            kind=kind,
            compressed=True,
            reason=self.reason,
            tokens=store.length,
            pages=sum(1 for _ in store.pages()),
            elements=elements * store.length,
            nbytes=store.nbytes,
            raw_vectors=tuple(sorted(store.raw_reasons().items())),
            tail_tokens=store.tail.length,
            materialized=self.materialized,
            raw_elements=raw_elements,
            raw_nbytes=raw_nbytes,
            metadata_nbytes=store.metadata_nbytes,
            flags=store.flags or (),
            host_nbytes=store.offloaded()[0],
        )

    @property
    def reason(self) -> str:
        """How it is compressed."""
        if self.settings.rungs:
            return f"on the pool's ladder: {self._pages_by_rung()}"
        keys, values = self.settings.names(self.index)
        if self.is_latent:
            return f"latents {keys}, rotary keys raw; the model expands them at every step"
        return f"keys {keys}, values {values}"

    def _pages_by_rung(self) -> str:
        pages = () if self.store is None else self.store.pages()
        counts = Counter(entry.rung for page in pages if (entry := self.inventory.entry(page)) is not None)
        return ", ".join(f"{count} pages {rung}" for rung, count in counts.items()) or "no pages yet"

    def _count(self) -> None:
        self.materialized += 1
