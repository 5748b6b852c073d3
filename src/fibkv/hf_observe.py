"""Looking on while a model attends: queries, keys and values of its layers, as the cache sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fibkv.errors import ModelError
from fibkv.hf_attention import attention_forward
from fibkv.hf_model import plan_model
from fibkv.hf_switch import switched

OBSERVED_NAME = "fibkv_observed"


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One call of attention.

    Attributes:
        layer: index of the layer.
        query: ``[B, Hq, Q, d]``, with rotary embedding.
        keys: ``[B, H, L, d]``, with rotary embedding, as they are cached.
        values: ``[B, H, L, d_value]``.
        scale: of the logits.
    """

    layer: int
    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float


Observer = Callable[[Observation], None]

# transformers calls attention by name and hands it nothing of ours.
_OBSERVER: ContextVar[Observer] = ContextVar("fibkv_observer")


def _observed_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention_forward`, after the observer has been told."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = getattr(module, "layer_idx", None)
    if layer is not None:
        _OBSERVER.get()(Observation(int(layer), query.detach(), key.detach(), value.detach(), scale))
    out, _ = attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out, None


AttentionInterface.register(OBSERVED_NAME, _observed_forward)
AttentionMaskInterface.register(OBSERVED_NAME, sdpa_mask)


def observable_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers whose cached keys and values are those that attention reads, and that fibkv compresses.

    Raises:
        ModelError: the model has none, or caches latents that it expands itself.
    """
    plan = plan_model(model)
    if plan.latent_widths is not None:
        raise ModelError(f"{type(model).__name__}: it caches latents and expands them itself: there is nothing to see")
    layers = tuple(index for index, layer in enumerate(plan.layers) if layer.why_stock is None)
    if not layers:
        raise ModelError(f"{type(model).__name__}: fibkv compresses none of its layers")
    return layers


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Tells an observer of every call of attention on a layer that fibkv compresses, while the context lasts.

    Args:
        model: in evaluation mode. One that does not follow transformers' attention interface is not seen.
        observer: must keep nothing that it does not need: keys and values of a long text are large.

    Raises:
        ModelError: see `observable_layers`.
    """
    layers = set(observable_layers(model))

    def chosen(seen: Observation) -> None:
        if seen.layer in layers:
            observer(seen)

    token = _OBSERVER.set(chosen)
    try:
        with switched(model, OBSERVED_NAME):
            yield
    finally:
        _OBSERVER.reset(token)


@torch.no_grad()
def observe(model: PreTrainedModel, ids: Tensor) -> list[Observation]:
    """What one plain forward pass over ``ids`` [tokens] shows, layer by layer.

    Raises:
        ModelError: see `observable_layers`; or the model was not seen, since its attention is its own.
    """
    seen: dict[int, Observation] = {}

    def note(one: Observation) -> None:
        seen[one.layer] = one

    with observed(model, note):
        model(input_ids=ids[None].to(model.device), use_cache=False)
    if not seen:
        raise ModelError(f"{type(model).__name__}: it does not follow transformers' attention interface")
    return [seen[layer] for layer in sorted(seen)]
