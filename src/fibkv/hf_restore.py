"""`fibkv.restore`: a cache that begins with the longest stored part of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.errors import BudgetError, FibkvError, ModelError
from fibkv.hf import Cache
from fibkv.hf_identity import bind, identify
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_prefix import plain_ids, why_not_stored
from fibkv.hf_states import has_state, put_state
from fibkv.manifest import LayerForm, Root
from fibkv.prefix import TokenIds
from fibkv.prefix_load import Prefix, PrefixLoader, Restored
from fibkv.sealing import LayerSettings
from fibkv.shape import KVShape
from fibkv.store.base import Store, check_store


def restore(
    model: PreTrainedModel, token_ids: TokenIds | Tensor, store: Store, *, name: str | None = None, **settings: Any
) -> Cache:
    """A cache for a prompt, filled with the longest beginning of it that a store has, less its last token.

    ``model.generate(token_ids, cache=cache)`` computes the rest. `Cache.restored` says what was found and
    what failed: a store that cannot be reached, or an object that is damaged, makes for a shorter beginning, and at
    worst for an empty cache.

    Args:
        model: a causal language model of transformers.
        token_ids: ``[t]`` or ``[1, t]``, the prompt.
        store: where `Cache.save` has put prefixes.
        name: as given to `Cache.save`.
        settings: of `fibkv.Cache`; the same as those of the cache that was saved.

    Raises:
        ContractError: no store, ids of other than one row, or settings that `fibkv.Cache` refuses.
        ModelError: a model that `fibkv.Cache` refuses, or the configuration of one.
    """
    check_store("restore.store", store)
    if isinstance(model, PretrainedConfig):
        raise ModelError(f"restore: expected a model, whose weights count, got {type(model).__name__}")
    cache = Cache(model, **settings)
    ids = plain_ids(token_ids)
    loader = PrefixLoader(store, bind(cache.settings, identify(model, name=name)), ids)
    tokens = 0
    if why := why_not_stored(cache.layers):
        loader.failures.append(why)
    elif (root := loader.root()) is not None:
        tokens = _fill(cache, loader, root, model.device)
    if tokens >= len(ids):
        # The model must be asked for at least one token, or there are no logits.
        tokens = max(0, len(ids) - 1)
        cache.crop_to(tokens)
    if not tokens:
        cache.reset()
    cache.restored = Restored(
        tokens=tokens, prompt_tokens=len(ids), nbytes=loader.nbytes, failures=tuple(loader.failures)
    )
    return cache


def _fill(cache: Cache, loader: PrefixLoader, root: Root, device: torch.device) -> int:
    """Fills an empty cache with what the loader finds; returns the number of tokens."""
    layers = {layer.index: layer for layer in cache.layers if isinstance(layer, CompressedLayer)}
    stateful = {index: layer for index, layer in enumerate(cache.layers) if has_state(layer)}
    try:
        settings = [_initialize(layers[form.layer], form, device) for form in root.layers]
        memory = next(layer.inventory for layer in layers.values())
        # In a pool nothing is put into memory before there is room for all of it.
        slabs = memory.slabs if device.type == "cpu" and not memory.tracked else None
        prefix = loader.load(settings, with_states=bool(stateful), slabs=slabs)
        if prefix.length and [state.layer for state in prefix.states] != list(stateful):
            raise ModelError(f"expected states of layers {list(stateful)}")
        for state in prefix.states:
            put_state(stateful[state.layer], state, prefix.length, device)
    except (FibkvError, KeyError) as error:
        loader.failures.append(f"stored by other profiles or layers: {error}")
        return 0
    try:
        with cache.room_for(_most(prefix, settings)):
            for index, form in enumerate(root.layers):
                store = layers[form.layer].store
                assert store is not None
                empty = store.tail.keys, store.tail.values
                store.adopt(prefix.pages[index], *(empty if prefix.tails is None else prefix.tails[index]))
    except BudgetError as error:
        loader.failures.append(str(error))
        return 0
    return prefix.length


def _most(prefix: Prefix, settings: Sequence[LayerSettings]) -> int:
    """Bytes that a prefix may take in memory: its codes, a quarter more for the order of kernels, and full tails."""
    pages = sum(page.nbytes for column in prefix.pages for page in column)
    tails = (
        (layer.tokens_per_page + layer.last_tokens_raw)
        * (_row_nbytes(layer.key_shape) + _row_nbytes(layer.value_shape))
        for layer in settings
    )
    return pages * 5 // 4 + sum(tails)


def _row_nbytes(shape: KVShape) -> int:
    """Bytes of one token of a layer, raw."""
    return shape.kv_heads * shape.head_dim * TORCH_DTYPES[shape.dtype].itemsize


def _initialize(layer: CompressedLayer, form: LayerForm, device: torch.device) -> LayerSettings:
    """Makes a layer's store before it has seen tokens, from the form of the one that was saved.

    Raises:
        ModelError: its pages would bear other profiles.
    """
    keys, values = (
        torch.empty(1, form.kv_heads, 0, width, dtype=TORCH_DTYPES[form.dtype], device=device)
        for width in (form.key_dim, form.value_dim)
    )
    layer.lazy_initialization(keys, values)
    assert layer.store is not None
    if (actual := LayerForm.of(layer.store.settings)) != form:
        raise ModelError(f"layer {layer.index}: expected {actual}, got {form}")
    return layer.store.settings
