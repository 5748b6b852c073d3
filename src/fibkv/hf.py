"""Hugging Face transformers: a drop-in cache, and attention on its pages.

    cache = fibkv.Cache(model, bits=4)
    with fibkv.attention(model):
        model.generate(**inputs, past_key_values=cache)

Layers of full attention are kept in compressed pages. Sliding-window, linear and shared layers, and layers whose
cache is not keys and values (multi-head latent attention), stay in the stock classes; `Cache.report` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as StockCache
from transformers.cache_utils import DynamicCache, DynamicLayer

from fibkv.errors import ModelError
from fibkv.hf_layer import CompressedLayer, untouched_report
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.report import CacheReport
from fibkv.settings import CacheSettings, Choice


class Cache(StockCache):
    """A cache for ``model.generate(past_key_values=...)`` or for direct calls of a model.

    Args:
        model: a causal language model of transformers, or its configuration.
        bits: 1, 2, 3, 4 (FibQuant), 8 (int8) or 16 (raw), or a pair for keys and values. Default 4.
        profile: instead of bits: a name of `fibkv.parameters.PARAMETER_NAMES`, codec parameters, or a pair of either.
        policy: what is compressed. Default: all of it per token, except the first 4 and the last 64 tokens.
        tokens_per_page: tokens of a sealed page.
        raw_dtype: of protected vectors and raw pages: "f16", "bf16" or "f32"; default: the model's.
        read_through: attention reads even the newest tokens through the codec, and the policy protects nothing
            unless one is given: for honest evaluation, not for use.
        implementation: of the kernels: "auto" or a name of `fibkv.kernels.available`.

    Raises:
        ModelError: the model cannot be served: what it is, and what to do instead.
        ContractError: settings that contradict each other or the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        bits: int | tuple[int, int] | None = None,
        profile: Choice | tuple[Choice, Choice] | None = None,
        policy: Policy | None = None,
        tokens_per_page: int = 64,
        raw_dtype: str | None = None,
        read_through: bool = False,
        implementation: str = "auto",
    ) -> None:
        if not isinstance(model, PreTrainedModel | PretrainedConfig):
            raise ModelError(
                f"Cache: expected a model of transformers or its configuration, got {type(model).__name__}"
            )
        config = model if isinstance(model, PretrainedConfig) else model.config
        if config.is_encoder_decoder:
            raise ModelError(
                f"{type(config).__name__}: encoder-decoder models are not supported; use EncoderDecoderCache"
            )
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_attention_heads", None) is None:
            raise ModelError(f"{type(text).__name__}: it has no attention heads, so there is nothing to compress")
        stock = DynamicCache(config=config).layers
        self.settings = CacheSettings.of(
            bits=bits,
            profile=profile,
            policy=policy,
            tokens_per_page=tokens_per_page,
            raw_dtype=raw_dtype,
            read_through=read_through,
            implementation=implementation,
            layers=len(stock),
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            query_heads=text.num_attention_heads,
        )
        self.quarantine = Quarantine()
        # Multi-head latent attention keeps (latent, rotary key) in the places of (keys, values).
        self.latent = getattr(text, "kv_lora_rank", None) is not None
        # Cross-attention (mllama) reads its layers' tensors directly.
        crossing = getattr(text, "cross_attention_layers", None) or ()
        layers = [
            CompressedLayer(index, self.settings, self.quarantine)
            if type(layer) is DynamicLayer and not self.latent and index not in crossing
            else layer
            for index, layer in enumerate(stock)
        ]
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens to one layer; returns what attention reads.

        Raises:
            ModelError: an earlier call failed between two layers, so that they hold different numbers of tokens.
        """
        self._check_step(layer_idx, key_states.shape[-2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def _check_step(self, layer_idx: int, tokens: int) -> None:
        """Layers are filled in turn: the first one leads by `tokens` while the others follow.

        The first layer's turn checks all, the others' turns themselves: a step costs one look at each layer.
        """
        layer = self.layers[layer_idx]
        first = next((other for other in self._compressed() if other.store is not None), None)
        if first is None or not isinstance(layer, CompressedLayer):
            return
        leads = layer is first
        expected = first.get_seq_length() - (0 if leads else tokens)
        looked_at = (other for other in self._compressed() if other.store is not None) if leads else (layer,)
        for other in looked_at:
            if (held := other.get_seq_length()) != expected:
                least = min(one.get_seq_length() for one in self._compressed())
                raise ModelError(
                    f"cache out of step after a failed call: layer {other.index} holds {held} tokens, "
                    f"expected {expected}; cache.crop_to({least}) mends it"
                )

    def crop_to(self, length: int) -> None:
        """Keeps the first ``length`` tokens of every compressed layer, whatever each of them holds.

        Raises:
            ModelError: a layer that is left to transformers holds tokens too, and cannot be cut alike.
        """
        for layer in self.layers:
            if not isinstance(layer, CompressedLayer) and getattr(layer, "is_initialized", False):
                raise ModelError(f"crop_to: {type(layer).__name__} cannot be cut to a length; start with a new cache")
        for compressed in self._compressed():
            if compressed.store is not None:
                compressed.store.crop(length)

    def report(self) -> CacheReport:
        """Bytes counted, per layer: what is compressed, what is left raw and why."""
        compressed = list(self._compressed())
        tables = (table for layer in compressed if layer.store for table in layer.store.settings.tables())
        shared = {id(tensor): tensor.nbytes for table in tables for tensor in table.tensors}
        return CacheReport(
            layers=tuple(
                layer.report()
                if isinstance(layer, CompressedLayer)
                else untouched_report(index, layer, self._why(layer))
                for index, layer in enumerate(self.layers)
            ),
            tables_nbytes=sum(shared.values()),
            materialized=sum(layer.materialized for layer in compressed),
        )

    def verify(self) -> tuple[Any, ...]:
        """Checks every page against its digest; returns the records of those now in quarantine.

        A cache with a page in quarantine refuses to be read.
        """
        for layer in self._compressed():
            if layer.store is not None:
                layer.store.verify()
        return tuple(self.quarantine.records)

    def corrupt_page(self, *, layer: int, row: int, page: int) -> AbstractContextManager[None]:
        """For poison tests: damages one page in memory while the context lasts, then restores it exactly.

        Raises:
            ModelError: there is no such page.
        """
        held = self.layers[layer] if layer < len(self.layers) else None
        if not isinstance(held, CompressedLayer) or held.store is None:
            raise ModelError(f"layer {layer}: expected a filled compressed layer, got {held}")
        rows = held.store.rows
        if row >= len(rows) or page >= len(rows[row]):
            raise ModelError(
                f"layer {layer}: expected one of {len(rows)} rows x {len(rows[0])} pages, got {row}, {page}"
            )
        return held.store.corrupted(row, page)

    def _why(self, layer: Any) -> str:
        """Why a layer is left to transformers."""
        if type(layer) is DynamicLayer and self.latent:
            return "latent attention, left to transformers' DynamicLayer"
        return f"left to transformers' {type(layer).__name__}"

    def _compressed(self) -> Iterator[CompressedLayer]:
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))
