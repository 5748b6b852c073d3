"""What a model asks of its cache: which layers fibkv compresses, which stay in transformers' own classes, and why.

Compressed are the keys and values of layers whose cache grows with the context, and the latents of multi-head latent
attention. The rest is of fixed size (windows, states), or a model reads it in a way of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from fibkv.digest import digest
from fibkv.errors import ModelError
from fibkv.view import DTYPE_NAMES

MODEL_DOMAIN = "fibkv_model_config_v1"
# By class name: not every release has every class.
_WHY_STOCK = {
    "DynamicSlidingWindowLayer": "a window of fixed size",
    "DynamicIndexedLayer": "sparse attention, with index keys beside its keys and values",
    "LinearAttentionLayer": "a state of fixed size",
    "LinearAttentionAndSlidingWindowAttentionLayer": "a window and a state of fixed size",
    "DummyLayer": "no cache of its own",
}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
        stock: transformers' layer for it, empty.
        why_stock: why it is left to that layer; None = compressed.
    """

    stock: Any
    why_stock: str | None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What happens to the layers of a model.

    Attributes:
        layers: in order.
        query_heads: query heads of a layer.
        kv_heads: heads that a compressed layer caches.
        head_dims: every width of keys and values that the configuration speaks of; layers may differ in theirs.
        latent_widths: with multi-head latent attention, the widths (latent, rotary key) of what a layer caches in the
            places of keys and values; else None.
    """

    layers: tuple[LayerPlan, ...]
    query_heads: int
    kv_heads: int
    head_dims: tuple[int, ...]
    latent_widths: tuple[int, int] | None


def plan_model(model: PreTrainedModel | PretrainedConfig) -> ModelPlan:
    """The plan for a causal language model of transformers, or for its configuration.

    Raises:
        ModelError: the model cannot be served: what it is, and what to do instead.
    """
    if not isinstance(model, PreTrainedModel | PretrainedConfig):
        unwrap = "; unwrap it by its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise ModelError(
            f"Cache: expected a model of transformers or its configuration, got {type(model).__name__}{unwrap}"
        )
    config = model if isinstance(model, PretrainedConfig) else model.config
    if config.is_encoder_decoder:
        raise ModelError(f"{type(config).__name__}: encoder-decoder models are not supported; use EncoderDecoderCache")
    _check_dtype(model)
    if isinstance(model, PreTrainedModel) and not _takes_a_cache(model):
        raise ModelError(
            f"{type(model).__name__}: it works with a cache class of its own only; call it without a cache"
        )
    text = config.get_text_config(decoder=True)
    query_heads = getattr(text, "num_attention_heads", None)
    if query_heads is None:
        raise ModelError(f"{type(text).__name__}: it has no attention heads, so there is nothing to compress")
    latent_rank = getattr(text, "kv_lora_rank", None)
    return ModelPlan(
        layers=_plan_layers(config, text),
        query_heads=query_heads,
        # All heads share one latent.
        kv_heads=1 if latent_rank else getattr(text, "num_key_value_heads", None) or query_heads,
        head_dims=_head_dims(text, query_heads),
        latent_widths=(latent_rank, text.qk_rope_head_dim) if latent_rank else None,
    )


def _check_dtype(model: PreTrainedModel | PretrainedConfig) -> None:
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype not in DTYPE_NAMES:
        raise ModelError(
            f"{type(model).__name__}: expected float16, bfloat16 or float32, got {dtype}; convert it: model.to(dtype)"
        )


def _takes_a_cache(model: PreTrainedModel) -> bool:
    """Whether ``generate`` would give it a DynamicCache; models that cannot generate are taken at their word."""
    asked = getattr(model, "_supports_default_dynamic_cache", None)
    return asked is None or bool(asked())


def _head_dims(text: PretrainedConfig, query_heads: int) -> tuple[int, ...]:
    named = {value for name, value in vars(text).items() if name.endswith(("head_dim", "kv_lora_rank"))}
    hidden = getattr(text, "hidden_size", None)
    if hidden is not None and getattr(text, "head_dim", None) is None:
        named.add(hidden // query_heads)
    return tuple(sorted(width for width in named if isinstance(width, int)))


def _plan_layers(config: PretrainedConfig, text: PretrainedConfig) -> tuple[LayerPlan, ...]:
    try:
        stock = DynamicCache(config=config).layers
    except KeyError as error:
        raise ModelError(
            f"{type(text).__name__}: layer kind {error} has no cache class in this release of transformers; "
            "import the model's own module first, or use the cache that it comes with"
        ) from error
    read_directly = _read_directly(text)
    plans = [LayerPlan(layer, read_directly.get(index) or _why_stock(layer)) for index, layer in enumerate(stock)]
    # The model appends copies of its own to a cache without them.
    return (*plans, *(copy.deepcopy(plans[index]) for index in _further_passes(text)))


def _read_directly(text: PretrainedConfig) -> dict[int, str]:
    """The layers whose tensors a model reads without an update, and why."""
    crossing = dict.fromkeys(_crossing(text), "cross-attention, read by the model directly")
    if getattr(text, "recurrent_kv_cache_mode", None) != "last_loop":
        return crossing
    return crossing | dict.fromkeys(_recurrent(text), "read by earlier passes of the model directly")


def _crossing(text: PretrainedConfig) -> Iterable[int]:
    return getattr(text, "cross_attention_layers", None) or ()  # mllama


def _recurrent(text: PretrainedConfig) -> range:
    """The layers that Dory runs again."""
    return range(text.n_input_layers, text.n_input_layers + text.n_recurrent_layers)


def _further_passes(text: PretrainedConfig) -> list[int]:
    """Of a looped model, the layers of each pass after the first: each has a cache of its own, behind those of all."""
    if getattr(text, "recurrent_kv_cache_mode", None) == "per_loop":  # Dory
        return [*_recurrent(text)] * (text.n_recurrent_loops - 1)
    if (passes := getattr(text, "loop_num_passes", None)) is not None:  # Inkling 2 Loop
        return [*range(text.loop_layer_index_start, text.loop_layer_index_end)] * (passes - 1)
    return []


def _why_stock(layer: Any) -> str | None:
    # Other subclasses add state, or another meaning of their keys and values.
    if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return None
    return _WHY_STOCK.get(type(layer).__name__, "a cache class of the model's own")


def model_digest(config: PretrainedConfig) -> str:
    """Digest of a model's configuration, without what depends on where it lies and how it is run."""
    fields = config.to_dict()
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_internal")
    return digest(MODEL_DOMAIN, {name: _plain(fields[name]) for name in sorted(fields) if name not in left_out})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # limits of time steps, which JSON has no numbers for
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
