"""The layers that stay in transformers' own classes: what they hold, and whether tokens can be taken back from them.

The latter is asked before anything is changed: their own `crop` raises only in some of the cases, and only after the
layers before it have been cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from fibkv.report import LayerReport

_REMEDY = "call cache.activate_past_recording() before the tokens come"


def report_of(index: int, layer: Any, reason: str) -> LayerReport:
    """What one of transformers' layers holds: keys, values and states, uncompressed."""
    floating = (tensor for tensor in _tensors(layer) if tensor.is_floating_point())
    return LayerReport(
        layer=index,
        kind=type(layer).__name__,
        compressed=False,
        reason=reason,
        tokens=layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0,
        pages=0,
        elements=sum(tensor.numel() for tensor in floating),
        nbytes=nbytes_of(layer),
    )


def nbytes_of(layer: Any) -> int:
    """Bytes of what one of transformers' layers holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(layer))


def num_rows(layer: Any) -> int:
    """Batch rows that one of transformers' layers holds; 0 if it is empty."""
    return next((t.shape[0] for t in _tensors(layer) if t.is_floating_point() and t.numel()), 0)


def state_tensors(layer: Any) -> Iterator[Tensor]:
    """The states that a layer keeps by number or name."""
    tables = (value for value in vars(layer).values() if isinstance(value, dict))
    yield from (tensor for table in tables for tensor in table.values() if isinstance(tensor, Tensor))


def _tensors(layer: Any) -> Iterator[Tensor]:
    """The tensors of a layer: its attributes and its states."""
    yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
    yield from state_tensors(layer)


def why_not_cropped(layer: Any, tokens: int) -> str | None:
    """Why that many of the newest tokens cannot be taken back from a layer; None if they can."""
    if tokens == 0:
        return None
    kind = type(layer)
    # A model's own class that adds state, and leaves its crop to the class that it comes from.
    if kind.__module__ != cache_utils.__name__ and "crop" not in vars(kind):
        return f"{kind.__name__} keeps state that its crop does not know of"
    linear = _why_not_linear(layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else None
    window = _why_not_window(layer, tokens) if isinstance(layer, DynamicSlidingWindowLayer) else None
    return linear or window


def holds_state(layer: Any) -> bool:
    """Whether a layer of linear attention has seen tokens: its state cannot be cut to a length."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and _is_filled(layer)


def holds_convolutions_only(layer: Any) -> bool:
    """Whether a layer of linear attention has seen tokens and has no recurrent state, which is made with the first."""
    return _is_filled(layer) and not any(layer.is_recurrent_states_initialized.values())


def _why_not_linear(layer: Any) -> str | None:
    if any(layer.is_recurrent_states_initialized.values()):
        return "the state of linear attention cannot be taken back"
    if _is_filled(layer) and not layer.record_past:
        return f"its convolution recorded no past; {_REMEDY}"
    return None


def _why_not_window(layer: Any, tokens: int) -> str | None:
    length, window = layer.get_seq_length(), layer.sliding_window
    if length < window:
        return None
    if not layer.record_past:
        return f"its window of {window} tokens is full and recorded no past; {_REMEDY}"
    spare = layer.keys.shape[-2] - min(window - 1, length - tokens)
    return f"its window of {window} tokens recorded only {spare} tokens more" if spare < tokens else None


def _is_filled(layer: Any) -> bool:
    return any((*layer.is_conv_states_initialized.values(), *layer.is_recurrent_states_initialized.values()))
