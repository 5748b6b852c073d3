"""Windows and states that transformers keeps beside pages: taken for a stored prefix, and put back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from fibkv.errors import ModelError
from fibkv.hf_hybrid import CompressedHybridLayer
from fibkv.hf_layer import CompressedLayer
from fibkv.states import LayerState


def has_state(layer: Any) -> bool:
    """Whether a layer holds something beside pages that `take_state` knows."""
    known = isinstance(layer, DynamicSlidingWindowLayer | LinearAttentionCacheLayerMixin)
    # Subclasses of models add tensors of their own.
    return known and (type(layer).__module__ == cache_utils.__name__ or isinstance(layer, CompressedHybridLayer))


def is_stored(layer: Any) -> bool:
    """Whether all that a layer holds can be stored."""
    pages = isinstance(layer, CompressedLayer) and not layer.settings.rungs
    return (pages and type(layer) is CompressedLayer) or has_state(layer) or type(layer).__name__ == "DummyLayer"


def take_state(index: int, layer: Any) -> LayerState:
    """What a layer holds beside pages, without what it keeps to take tokens back."""
    numbers: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        numbers["cumulative_length"] = layer.cumulative_length
        for name in ("keys", "values"):
            tensors[name] = getattr(layer, name)[:, :, -layer.sliding_window + 1 :]
    for state in range(getattr(layer, "number_of_states", 0)):
        numbers[f"has_previous_state.{state}"] = int(layer.has_previous_state[state])
        if layer.is_conv_states_initialized[state]:
            tensors[f"conv_states.{state}"] = layer.conv_states[state][..., -layer.conv_kernel_size[state] :]
        if layer.is_recurrent_states_initialized[state]:
            tensors[f"recurrent_states.{state}"] = layer.recurrent_states[state]
    return LayerState(index, type(layer).__name__, numbers, tensors)


def put_state(layer: Any, state: LayerState, length: int, device: torch.device) -> None:
    """Gives an empty layer what `take_state` took from another one after ``length`` tokens.

    Raises:
        ModelError: it was another kind of layer, of other rows or tokens.
    """
    if not has_state(layer) or type(layer).__name__ != state.kind:
        raise ModelError(
            f"layer {state.layer}: expected the state of a {type(layer).__name__}, got that of {state.kind}"
        )
    tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
    if any(tensor.shape[:1] != (1,) for tensor in tensors.values()):
        raise ModelError(f"layer {state.layer}: expected states of one row, got {state.form()}")
    if isinstance(layer, DynamicSlidingWindowLayer):
        window = min(length, layer.sliding_window - 1)
        held = [tuple(tensors[name].shape[2:3]) for name in ("keys", "values") if name in tensors]
        if state.numbers.get("cumulative_length") != length or held != [(window,)] * 2:
            raise ModelError(
                f"layer {state.layer}: expected a window of {window} of {length} tokens, got {state.form()}"
            )
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        layer.cumulative_length = length
    for index in range(getattr(layer, "number_of_states", 0)):
        for name in ("conv_states", "recurrent_states"):
            if (tensor := tensors.get(f"{name}.{index}")) is not None:
                layer.lazy_initialization(**{name: tensor}, state_idx=index)
                getattr(layer, name)[index].copy_(tensor)
        layer.has_previous_state[index] = bool(state.numbers.get(f"has_previous_state.{index}", 0))
