"""What the cache of a model of transformers will report, from the configuration alone.

The model is built on torch's meta device, where tensors have shapes and no data, and is shown a few tokens: what it
hands its cache says the widths of every layer, whatever the configuration calls them, and the sizes of states.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from fibkv.errors import ModelError
from fibkv.forecast import forecast_layer
from fibkv.hf import Cache
from fibkv.hf_argument import with_cache
from fibkv.hf_hybrid import CompressedHybridLayer
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_model import plan_model
from fibkv.hf_stock import report_of, state_tensors
from fibkv.page import METADATA_NBYTES
from fibkv.ranges import Ranges
from fibkv.report import CacheReport, LayerReport
from fibkv.sealing import LayerSettings

_META = torch.device("meta")
# Enough for the convolutions of state spaces to be more than their first token.
_SHOWN_TOKENS = 3


class ShapeProbe:
    """What a model caches per row and token, layer by layer, and the bytes of its weights.

    Attributes:
        config: of the model.
        layers: transformers' layers after a few tokens of one row, on the meta device.
        weights_nbytes: parameters and buffers, shared ones once.

    Raises:
        ModelError: on construction; the model cannot be served, or cannot be run without data.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype | None = None) -> None:
        plan_model(config)
        self.config = config
        model = _meta_model(config, dtype)
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.weights_nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        cache = DynamicCache(config=config)
        ids = torch.zeros(1, _SHOWN_TOKENS, dtype=torch.long, device=_META)
        try:
            with torch.no_grad():
                model(ids, **with_cache(cache), use_cache=True)
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{type(model).__name__}: its forward needs data, so its cache cannot be planned from the "
                f"configuration; load it and read Cache.report() after a prompt ({str(error).splitlines()[0]})"
            ) from error
        self.layers: list[Any] = list(cache.layers)


def _meta_model(config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    # Eager attention looks at no mask's values to save work, whereas `sdpa` may; what is cached is the same.
    chosen: dict[str, Any] = {"attn_implementation": "eager", **({} if dtype is None else {"dtype": dtype})}
    try:
        with _META:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **chosen)
    except ValueError as error:
        raise ModelError(
            f"{type(config).__name__}: expected the configuration of a causal language model of transformers "
            f"({str(error).splitlines()[0]})"
        ) from error
    # Else some models look for padding, to warn of it.
    model.config.pad_token_id = None
    # Experts one by one ask which of them are hit. Models without experts refuse the choice.
    with contextlib.suppress(ValueError, AttributeError):
        model.set_experts_implementation("batched_mm")
    evaluated: PreTrainedModel = model.eval()
    return evaluated


class CacheForecast:
    """What an empty cache will report once it is filled.

    Args:
        cache: empty; its settings count.
        probe: of the same model.
    """

    def __init__(self, cache: Cache, probe: ShapeProbe) -> None:
        self._cache = cache
        self._shown = probe.layers
        self._settings = [self._settings_of(index, layer) for index, layer in enumerate(cache.layers)]

    def report(self, batch: int, tokens: int) -> CacheReport:
        """What `Cache.report` says after one prompt of ``tokens`` tokens in each of ``batch`` rows, on the CPU."""
        blocks = Ranges()
        layers = [self._layer(index, batch, tokens, blocks) for index in range(len(self._shown))]
        tables = (table for settings in self._settings if settings for table in settings.tables())
        shared = {id(tensor): tensor.nbytes for table in tables for tensor in table.tensors}
        return CacheReport(
            layers=tuple(layers), tables_nbytes=sum(shared.values()), slack_nbytes=blocks.allocated - blocks.used
        )

    def _settings_of(self, index: int, layer: Any) -> LayerSettings | None:
        if not isinstance(layer, CompressedLayer):
            return None
        keys, values = (torch.empty(1, t.shape[1], 0, t.shape[3], dtype=t.dtype) for t in _held(self._shown[index]))
        # As `CompressedLayer.lazy_initialization`.
        layer.is_latent = keys.shape[1] == 1 and (keys.shape[-1], values.shape[-1]) == layer.latent_widths
        return layer.settings.for_layer(index, keys, values, is_latent=layer.is_latent)

    def _layer(self, index: int, batch: int, tokens: int, blocks: Ranges) -> LayerReport:
        shown, settings = self._shown[index], self._settings[index]
        # States have one size, whatever the context.
        states = list(state_tensors(shown))
        if settings is None:
            report = self._stock(index, batch, tokens)
        else:
            report = self._compressed(index, settings, batch, tokens, blocks)
        return report.model_copy(
            update={
                "elements": report.elements + batch * sum(s.numel() for s in states if s.is_floating_point()),
                "nbytes": report.nbytes + batch * sum(s.numel() * s.element_size() for s in states),
            }
        )

    def _compressed(self, index: int, settings: LayerSettings, batch: int, tokens: int, blocks: Ranges) -> LayerReport:
        layer: CompressedLayer = self._cache.layers[index]  # type: ignore[assignment]
        counted = forecast_layer(settings, batch, tokens, blocks)
        state = "; its state of fixed size is left as it is" if isinstance(layer, CompressedHybridLayer) else ""
        widths = sum(t.shape[1] * t.shape[3] for t in _held(self._shown[index]))
        return LayerReport(
            layer=index,
            kind=type(layer).__name__,
            compressed=True,
            reason=layer.reason + state,
            tokens=tokens,
            pages=counted.pages,
            elements=batch * tokens * widths,
            nbytes=counted.nbytes,
            raw_vectors=tuple(sorted(counted.raw_vectors.items())),
            tail_tokens=counted.tail_tokens,
            raw_elements=counted.raw_elements,
            raw_nbytes=counted.raw_nbytes,
            metadata_nbytes=counted.pages * METADATA_NBYTES,
        )

    def _stock(self, index: int, batch: int, tokens: int) -> LayerReport:
        """Of transformers' own layer, filled on the meta device: it knows its window."""
        shown, plan = self._shown[index], self._cache.plan.layers[index]
        layer: Any = copy.deepcopy(plan.stock)
        if isinstance(getattr(shown, "keys", None), Tensor):
            layer.update(*(t.new_empty(batch, t.shape[1], tokens, t.shape[3]) for t in _held(shown)))
            if isinstance(indexed := getattr(shown, "indexer_keys", None), Tensor):
                layer.update_indexer(indexed.new_empty(batch, tokens, indexed.shape[-1]))
        return report_of(index, layer, plan.why_stock or "")


def _held(shown: Any) -> tuple[Tensor, Tensor]:
    return shown.keys, shown.values
