"""Steps of a model, layer by layer: whether what comes is what the cache is ready for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fibkv.errors import ModelError
from fibkv.hf_layer import CompressedLayer


def check_layer(layers: Sequence[Any], index: int) -> None:
    """Refuses a layer that the cache does not have.

    Raises:
        ModelError: the model is not the one that the cache was made for.
    """
    if index >= len(layers):
        raise ModelError(f"cache of {len(layers)} layers: got keys of layer {index}: it was made for another model")


def check_rows(layers: Sequence[Any], index: int, rows: int) -> None:
    """Refuses another number of rows than a layer holds.

    Raises:
        ModelError: with what to do instead.
    """
    layer = layers[index]
    held = (layer.num_rows if isinstance(layer, CompressedLayer) else 0) or rows
    if rows != held:
        expand = f"; for beams or num_return_sequences pass cache.fork({rows // held})" if rows % held == 0 else ""
        raise ModelError(f"layer {index}: expected {held} rows, which the cache holds, got {rows}{expand}")


def check_step(layers: Sequence[Any], index: int, tokens: int) -> None:
    """Layers are filled in turn: the first one leads by ``tokens`` while the others follow.

    The first layer's turn checks all, the others' turns themselves: a step costs one look at each layer.

    Raises:
        ModelError: an earlier step failed between two layers.
    """
    layer = layers[index]
    first = next(_filled(layers), None)
    if first is None or not isinstance(layer, CompressedLayer):
        return
    leads = layer is first
    expected = first.get_seq_length() - (0 if leads else tokens)
    for other in _filled(layers) if leads else (layer,):
        if (held := other.get_seq_length()) != expected:
            least = min(one.get_seq_length() for one in layers if isinstance(one, CompressedLayer))
            raise ModelError(
                f"cache out of step after a failed call: layer {other.index} holds {held} tokens, "
                f"expected {expected}; cache.crop_to({least}) mends it"
            )


def _filled(layers: Sequence[Any]) -> Iterator[CompressedLayer]:
    return (layer for layer in layers if isinstance(layer, CompressedLayer) and layer.store is not None)
