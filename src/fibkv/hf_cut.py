"""Cutting the newest tokens off a cache: off all of its layers, or off none."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from fibkv.errors import ModelError
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_stock import holds_state, num_rows, why_not_cropped


def cut(layers: Sequence[Any], removals: Sequence[int]) -> None:
    """Removes so many of the newest tokens of each layer.

    Raises:
        ModelError: a layer that is left to transformers cannot take them back. All are as they were then.
    """
    for index, (layer, remove) in enumerate(zip(layers, removals, strict=True)):
        if why := why_not_cropped(layer, remove):
            raise ModelError(f"crop: layer {index} cannot lose {remove} tokens: {why}")
    for layer, remove in zip(layers, removals, strict=True):
        # Empty layers of transformers have nothing to cut; those that record their past shed it even at 0.
        is_held = isinstance(layer, CompressedLayer) or num_rows(layer) > 0
        if is_held and (remove or getattr(layer, "record_past", False)):
            layer.crop(-remove)


def cut_to(layers: Sequence[Any], length: int) -> None:
    """Keeps the first ``length`` tokens of every layer, whatever each of them holds.

    Raises:
        ModelError: a negative length, or a layer that is left to transformers cannot be cut alike. All are as they
            were then.
    """
    if (length := operator.index(length)) < 0:
        raise ModelError(f"crop_to: expected the number of tokens to keep, got {length}")
    for index, layer in enumerate(layers):
        if holds_state(layer):
            raise ModelError(
                f"crop_to: layer {index}: the state of {type(layer).__name__} cannot be cut; start with a new cache"
            )
    lengths = [layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0 for layer in layers]
    cut(layers, [max(0, held - length) for held in lengths])
