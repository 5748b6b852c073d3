"""Caches of transformers in a store: which of them can be stored, and in what form their tokens are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fibkv.errors import ContractError, ModelError
from fibkv.hf_identity import bind
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_states import has_state, is_stored, take_state
from fibkv.prefix import TokenIds
from fibkv.prefix_save import Snapshot


def why_not_stored(layers: Sequence[Any]) -> str | None:
    """Why a cache of these layers cannot be stored; None if it can."""
    for index, layer in enumerate(layers):
        if isinstance(layer, CompressedLayer) and layer.settings.rungs:
            return f"layer {index}: a pool's ladder changes the codecs of its pages; give the cache bits or a profile"
        if not is_stored(layer):
            return f"layer {index}: what {type(layer).__name__} holds beside pages cannot be stored"
    return None if any(isinstance(layer, CompressedLayer) for layer in layers) else "no layer is kept in pages"


def plain_ids(token_ids: TokenIds | Tensor) -> npt.NDArray[np.integer]:
    """Token ids ``[t]`` from ``[t]`` or ``[1, t]``, of one row.

    Raises:
        ContractError: they are not the ids of one row.
    """
    ids = np.asarray(token_ids.detach().cpu() if isinstance(token_ids, Tensor) else token_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ContractError("token_ids", "whole numbers [t] or [1, t]", f"{ids.dtype} {list(ids.shape)}")
    return ids


def snapshot(cache: Any, token_ids: TokenIds | Tensor, name: str | None) -> Snapshot:
    """What a `fibkv.Cache` holds of one row; arguments and errors as those of `Cache.save`."""
    if why := why_not_stored(cache.layers):
        raise ModelError(f"save: {why}")
    held = [layer.store for layer in cache.layers if isinstance(layer, CompressedLayer) and layer.store is not None]
    states = [take_state(index, layer) for index, layer in enumerate(cache.layers) if has_state(layer)]
    return Snapshot.take(bind(cache.settings, cache.origin.identify(name)), held, plain_ids(token_ids), states)
