"""Attention on compressed pages, as transformers calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fibkv.attend import Scores, attend
from fibkv.errors import ModelError
from fibkv.handle import Handle
from fibkv.view import View

ATTENTION_NAME = "fibkv"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: on pages for handles, `sdpa` for plain tensors.

    Args:
        module: the attention module.
        query: ``[B, Hq, Q, d]``.
        key: handle or tensor ``[B, H, L, d]``.
        value: handle or tensor ``[B, H, L, d_value]``.
        attention_mask: ``[B, 1, Q, L]`` bool or floating, or None.
        dropout: must be 0, except on plain tensors without softcap and sinks.
        scaling: factor of the logits; default 1/sqrt(d).
        is_causal: without a mask, whether queries see only their own past; default: what the module says.
        **kwargs: ``softcap`` and the sinks ``s_aux [Hq]`` are honored, ``position_bias`` is refused.

    Returns:
        ``[B, Q, Hq, d_value]`` in the query's dtype, and None for the weights.

    Raises:
        ModelError: an argument that changes the result and is not handled.
    """
    if kwargs.get("position_bias") is not None:
        raise ModelError("fibkv.attention does not handle 'position_bias': run the model without it")
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if isinstance(key, Handle):
        view = key.source.view
    elif softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    else:
        # `sdpa` knows neither softcap nor sinks: plain tensors are a cache that is all tail.
        view = View.of_tensors(key, value)
    if dropout:
        raise ModelError(f"fibkv.attention has no dropout, got {dropout}: call model.eval()")
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        mask=attention_mask,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    out, lse = attend(query, view, scores, implementation=view.implementation)
    if sinks is not None:
        # A sink is one more logit that carries no value: it takes its share of the softmax.
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


# Both registries: a name that only the first one knows gets no mask at all, silently.
AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches a model to attention on compressed pages while the context lasts.

    Without it a `Cache` works too: whatever attention the model uses then decodes the layer at every step, and
    `Cache.report` counts that.

    Args:
        model: a model of transformers. One that does not follow its attention interface keeps its own attention.
    """
    with switched(model, ATTENTION_NAME):
        yield


@contextmanager
def switched(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switches a model and its parts to the attention registered under a name while the context lasts."""
    config = model.config
    subs = {name: getattr(config, name) for name in config.sub_configs}
    before = {"": config._attn_implementation}
    before |= {name: part._attn_implementation for name, part in subs.items() if part is not None}
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
